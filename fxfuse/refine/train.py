"""Fine-tuning on labels, and distillation of an ensemble without them.

Notation of shapes: b batch, k classes, * any further dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fxfuse.errors import InputError, MemberError, OptionError
from fxfuse.graph.run import untouched
from fxfuse.refine.batch import call, logits_of, split_batch
from fxfuse.refine.loop import RefineReport, Run, train
from fxfuse.refine.modes import check_teachers, device_of, evaluating, trainable

if TYPE_CHECKING:
    from rich.progress import Progress


def finetune(
    module: nn.Module,
    batches: Iterable[Any],
    *,
    steps: int,
    optimizer: Optimizer | None = None,
    scheduler: LRScheduler | None = None,
    loss: Callable[[Any, Any], Tensor] | None = None,
    device: torch.device | str | None = None,
    progress: bool | Progress = True,
    seed: int = 0,
) -> RefineReport:
    """Train `module` in place on labelled batches, and leave it in eval mode.

    The call draws its random numbers (dropout, shuffling) from generators seeded with `seed` and
    leaves torch's global generator as it was.

    Several processes may train one network that torch's DDP or `fully_shard` wraps: each calls with
    its own part of the batches, and otherwise the same arguments.

    Args:
        module: The network; trained in `train()` mode, so BatchNorm statistics are updated too.
        batches: Pairs (inputs, labels), iterated again when used up. Inputs are a tensor `[b, *]`,
            a tuple (positional arguments) or a dict (keyword arguments) of tensors.
        steps: Number of optimiser steps.
        optimizer: Of the module's parameters; None takes `default_optimizer` with its schedule.
        scheduler: Stepped after each optimiser step; needs `optimizer`.
        loss: Function of (module output, labels) that returns a scalar; None is cross-entropy of
            logits `[b, k, *]` and labels `[b, *]`.
        device: Where to train; None stays where the module is. The module is moved in place.
        progress: True shows a bar on stderr; a `rich.progress.Progress` gets a task of its own.
        seed: Seed of all random numbers drawn from torch during the run.

    Returns:
        The report, with the loss of every step.

    Raises:
        RefineError: The loss or a weight is no longer finite, or no parameter requires a gradient.
        InputError: A batch has no labels, or the batches ran out.
    """
    criterion = loss or _cross_entropy

    def batch_loss(batch: Any) -> Tensor:
        inputs, labels = split_batch(batch)
        if labels is None:
            raise InputError(
                "a batch has no labels",
                where=f"batches: a {type(batch).__name__}",
                why="fine-tuning compares the network's output with labels",
                how="pass pairs (inputs, labels), or use distill, which needs no labels",
            )
        return criterion(call(module, inputs), labels)

    return train(
        Run(
            module,
            batch_loss,
            batches,
            steps,
            *_optimizer(module, steps, optimizer, scheduler),
            device_of(module, device),
            progress,
            "fine-tuning",
            seed,
        )
    )


def distill(
    module: nn.Module,
    teachers: Sequence[nn.Module],
    batches: Iterable[Any],
    *,
    steps: int,
    temperature: float = 4.0,
    class_dim: int = 1,
    optimizer: Optimizer | None = None,
    scheduler: LRScheduler | None = None,
    device: torch.device | str | None = None,
    progress: bool | Progress = True,
    seed: int = 0,
) -> RefineReport:
    """Train `module` in place to answer like the ensemble of `teachers`; labels are not needed.

    The loss is T² · KL(softmax(t / T) ‖ softmax(s / T)), where s are the logits of `module` and t
    is the mean of the teachers' *logits*: the geometric mean of their probabilities (Hinton et al.,
    "Distilling the Knowledge in a Neural Network", arXiv:1503.02531, section 2). `match` goes
    towards the ensemble as its task combines it, by default the arithmetic mean. The factor T²
    keeps the size of the gradient independent of T.

    Args:
        module: The network to train, as in `finetune`.
        teachers: Networks that return logits of the same shape; run in eval mode, never changed
            except that they are moved to `device`.
        batches: Inputs, or pairs (inputs, labels), whose labels are ignored. A tuple or list is
            always such a pair, or the inputs alone in a tuple of one; write `((a, b), None)` for a
            network that takes two tensors.
        steps: As in `finetune`.
        temperature: T; above 1 it shows the student how the teachers rank the wrong answers.
        class_dim: Dimension of the logits `[b, k, *]` that holds the classes; -1 for `[b, *, k]`.
        optimizer: As in `finetune`.
        scheduler: As in `finetune`.
        device: As in `finetune`.
        progress: As in `finetune`.
        seed: As in `finetune`.

    Returns:
        The report, with the loss of every step.

    Raises:
        RefineError: The loss or a weight is no longer finite, or no parameter requires a gradient.
        InputError: The batches ran out.
        MemberError: A teacher returns outputs that cannot be distilled.
    """
    check_teachers(module, teachers, "teachers")
    check_temperature(temperature)
    target = device_of(module, device)

    def batch_loss(batch: Any) -> Tensor:
        inputs, _ = split_batch(batch)
        wanted = mean_logits(teachers, lambda teacher: call(teacher, inputs))
        return distillation_loss(logits_of(call(module, inputs)), wanted, temperature, class_dim)

    run = Run(
        module,
        batch_loss,
        batches,
        steps,
        *_optimizer(module, steps, optimizer, scheduler),
        target,
        progress,
        "distilling",
        seed,
    )
    with evaluating(teachers, target):
        return train(run)


def default_optimizer(
    module: nn.Module, steps: int, lr: float = 1e-3
) -> tuple[Optimizer, LRScheduler]:
    """Return AdamW on the trainable parameters, with a cosine schedule to 0 over `steps`."""
    optimizer = torch.optim.AdamW(trainable(module), lr=lr)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)


def _cross_entropy(output: Any, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits_of(output), labels)


def mean_logits(teachers: Sequence[nn.Module], ask: Callable[[nn.Module], Any]) -> Tensor:
    """Return the mean of the teachers' logits; `ask` runs one of them, which stays as it is."""
    answers = []
    with torch.no_grad():
        for teacher in teachers:
            with untouched(teacher):
                answers.append(logits_of(ask(teacher)))
        return torch.stack(answers).mean(dim=0)


def distillation_loss(
    student: Tensor, teacher: Tensor, temperature: float, class_dim: int
) -> Tensor:
    """Return T² · KL(teacher ‖ student), averaged over all positions of `[b, k, *]`."""
    if student.shape != teacher.shape:
        raise MemberError(
            "module and teachers return outputs of different shapes",
            where=f"module {list(student.shape)}, teachers {list(teacher.shape)}",
            why="distillation compares them class by class",
            how="use teachers with the module's classes and output size",
        )
    return _divergence(student, teacher, temperature, class_dim)


def _optimizer(
    module: nn.Module, steps: int, optimizer: Optimizer | None, scheduler: LRScheduler | None
) -> tuple[Optimizer, LRScheduler | None]:
    if optimizer is None:
        if scheduler is not None:
            raise OptionError(
                "scheduler needs its optimizer",
                where="scheduler",
                why="the default optimiser would not follow it",
                how="pass optimizer=, the one that the schedule was made for",
            )
        return default_optimizer(module, steps)
    own = {id(parameter) for parameter in module.parameters()}
    if not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
        raise OptionError(
            "the optimizer holds no parameter of this module",
            where="optimizer",
            why="its steps would leave the module unchanged",
            how="make the optimizer from the parameters of the module that is trained",
        )
    return optimizer, scheduler


def _divergence(
    answers: Tensor, wanted: Tensor, temperature: float = 1.0, class_dim: int = 1
) -> Tensor:
    """T² · KL(softmax(wanted / T) ‖ softmax(answers / T)), mean over all positions.

    Hinton et al., "Distilling the knowledge in a neural network", arXiv:1503.02531, section 2.

    Args:
        answers: Logits of the network `[b, *]`, with k classes along one dimension.
        wanted: Those of the ensemble, of the same shape.
        temperature: T.
        class_dim: The dimension of the classes.

    Returns:
        A scalar in nats, for T = 1.
    """
    total = functional.kl_div(
        (answers / temperature).log_softmax(class_dim),
        (wanted / temperature).log_softmax(class_dim),
        reduction="sum",
        log_target=True,
    )
    return total * (temperature**2 * wanted.shape[class_dim] / wanted.numel())


def check_temperature(temperature: float) -> None:
    """Check that a temperature is above 0."""
    if not temperature > 0:
        raise OptionError(
            f"temperature must be above 0, got {temperature}",
            where="temperature",
            why="logits are divided by it",
            how="use a value from 1 to 10",
        )
