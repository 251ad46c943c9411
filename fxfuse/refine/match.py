"""Match a network to an ensemble without labels: the mean of the members' logits is its target.

match: ask the members about inputs that judge, and a pool → (batch → loss → step)* until the budget
is spent → back on the way until it is closer to the ensemble than the start

Notation of shapes: n inputs, b batch, k classes, * any further dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fxfuse.activations.augment import Augment, default_augment
from fxfuse.common.options import Options
from fxfuse.errors import OptionError
from fxfuse.refine.batch import call, logits_of
from fxfuse.refine.distance import loss
from fxfuse.refine.interpolation import Judges, Start
from fxfuse.refine.modes import check_teachers, device_of, evaluating, seeded, trainable
from fxfuse.refine.outputs import Outputs, kind_of
from fxfuse.refine.parallel import together
from fxfuse.refine.pool import Pool, Teacher, check_inputs, make_judges, make_pool, split
from fxfuse.refine.schedule import (
    RATE,
    SHARE_OF_JUDGED,
    SHARE_OF_POOL,
    Budget,
    course,
    highest,
)
from fxfuse.refine.task import Task
from fxfuse.refine.watch import READ_EVERY, bar, check_weights, last_finite

if TYPE_CHECKING:
    from rich.progress import Progress

_STEPS = 300


@dataclass(frozen=True)
class Match(Options):
    """Matching: label-free training to answer like the ensemble.

    Attributes:
        steps: Budget in optimiser steps. With neither this nor `seconds`: 300.
        seconds: Budget in CPU seconds of this process, all threads together. What it gives depends
            on the machine, so it is not reproducible bit for bit, as a budget in steps is.
        batch: Inputs per step, 2 or more.
        learning_rate: Highest learning rate. None: 3e-3, or 6e-3 for a network that normalises by
            statistics of the batch; a start whose error on the held-out inputs is below a quarter
            of what the ensemble's answers vary by gets less, by the square of that error.
        weight_decay: Weight decay of parameters with two dimensions or more; others do not decay.
        augment: Function of (inputs `[b, *]`, CPU generator) that returns a copy; needs a single
            input tensor. None: `shift_and_mix` for floating images `[n, c, h, w]` and signals
            `[n, c, l]`, no copies for all others.
        seed: Seed of all random numbers; torch's global generators are left as they were.
    """

    steps: int | None = None
    seconds: float | None = None
    batch: int = 64
    learning_rate: float | None = None
    weight_decay: float = 1e-4
    augment: Augment | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Check that there is one budget, and that all numbers are positive."""
        super().__post_init__()
        if self.steps is not None and self.seconds is not None:
            raise OptionError(
                "steps and seconds contradict each other",
                where=f"steps={self.steps}, seconds={self.seconds}",
                why="the learning rate follows one of them to zero",
                how="pass steps or seconds",
            )
        for name in ("steps", "seconds", "learning_rate"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise OptionError(
                    f"{name} must be above 0, got {value}", how=f"pass a positive {name}"
                )
        if self.batch < 2:
            raise OptionError(
                f"batch must be at least 2, got {self.batch}",
                why="normalisation in training takes its statistics from a batch of two or more",
                how="pass a batch of 2 or more",
            )


@dataclass(frozen=True)
class MatchReport:
    """What a matching run did.

    Attributes:
        steps: Optimiser steps.
        first_loss: Loss of the first step, on its batch.
        last_loss: Loss of the last step, on its batch.
        seconds: CPU seconds of this process, all threads together; the members' answers included.
        pool: Inputs and augmented copies that the members answered.
        outputs: `logits` (compared up to a constant per input) or `values` (as they are).
        before: How far the start was from the ensemble on held-out inputs, copies of them where
            there is an augmentation: KL divergence in nats for logits, else the mean squared
            difference relative to the outputs' variance.
        after: The same of the network that is left; never above `before`.
        kept: The share that is kept of the way from start to end: 1 is all that was trained, 0 the
            start, which the training has brought no closer.
    """

    steps: int
    first_loss: float
    last_loss: float
    seconds: float
    pool: int
    outputs: Outputs
    before: float
    after: float
    kept: float


def match(
    module: nn.Module,
    members: Sequence[nn.Module],
    inputs: Any,
    options: Match | None = None,
    *,
    task: Task | None = None,
    progress: bool | Progress = False,
    device: torch.device | str | None = None,
) -> MatchReport:
    """Train `module` in place to answer like the mean of the members; no labels are needed.

    The members are asked once about a pool: the inputs, and augmented copies of them. The loss for
    logits is the KL divergence at temperature 2 and a tenth of the mean squared difference up to a
    constant, for values the latter as it is; AdamW with a short warm-up and a cosine to zero. The
    module is trained in train mode, which renews running statistics; they should not be
    recalibrated on clean inputs afterwards. It is left in eval mode.

    A tenth of the inputs, 8 to 128 of 32 or more, is held out, and judges by KL divergence (values:
    squared difference) on three augmented copies of each. The module is left at its end, at a half
    or a quarter of the way there, whichever is the first that is closer to the ensemble than the
    start, or else at its start.

    Where several processes train one network (DDP, `fully_shard`), each calls with the same
    arguments, asks the members itself and takes its part of every batch.

    Args:
        module: The network, of the members' input and output shapes.
        members: The networks to match, run in eval mode and never changed, except that they are
            moved to `device`. They return a tensor, or an object with a field `logits`.
        inputs: Unlabelled inputs `[n, *]`, or a tuple of positional inputs with the same n.
        options: Budget, batch, rate, augmentation and seed.
        task: What the output means: logits of classes `[b, k]` are compared up to a constant per
            input, values position by position. None: outputs `[b, k]`, k > 1, are logits.
        progress: True shows a bar on stderr; a `rich.progress.Progress` gets a task of its own.
        device: Where to train; None stays where the module is. The module is moved in place.

    Returns:
        Steps, losses, time, size of the pool, how outputs were compared, and what the held-out
        inputs say of the start and of what is left.

    Raises:
        MemberError: There are no members, or the module is among them.
        InputError: Inputs are missing or unfit.
        OptionError: A budget in seconds, or a batch without equal parts, for several processes.
        RefineError: Outputs have different shapes; a loss or weight is not finite.
    """
    options = options or Match()
    if options.seconds is not None and together(module).groups:
        raise OptionError(
            "A budget in seconds is for one process.",
            where="seconds",
            why="processes take their steps together, and seconds end at another step in each",
            how="pass steps= instead",
        )
    check_teachers(module, members, "members")
    batch, augment, seed = options.batch, options.augment, options.seed
    given = check_inputs(inputs, augment)
    target = device_of(module, device)
    module.to(target)
    # Before the clock starts: making a process's first optimiser imports for seconds.
    optimizer = _optimizer(module, options.learning_rate or RATE, options.weight_decay)
    steps = _STEPS if options.steps is None and options.seconds is None else options.steps
    budget = Budget(steps, options.seconds)
    trained, judging = split(given, seed)
    teacher = Teacher(members, augment or default_augment(given), batch, seed, target)
    with evaluating(members, target):
        judges = make_judges(teacher, judging, enough=lambda: budget.is_over(SHARE_OF_JUDGED))
        pool = make_pool(
            teacher,
            trained,
            drawn=None if budget.steps is None else budget.steps * batch,
            enough=lambda: budget.is_over(SHARE_OF_POOL),
        )
    kind = _kind(pool.targets, task)
    module.eval()
    start = Start(module, Judges(judges, kind, batch))
    budget.start_training(start.seconds)
    with seeded(seed, target), bar(progress, "matching", 1.0) as advance:
        try:
            module.train()
            losses = _train(
                module,
                pool,
                _orders(len(pool), batch, seed),
                optimizer,
                budget,
                kind,
                advance,
                lambda normalises: (
                    options.learning_rate or highest(start.error, normalises=normalises)
                ),
            )
        finally:
            module.eval()
    after, kept = start.settle()
    first, last = float(losses[0]), float(losses[-1])
    return MatchReport(
        len(losses), first, last, budget.spent(), len(pool), kind, start.distance, after, kept
    )


def _train(
    module: nn.Module,
    pool: Pool,
    orders: Iterator[Tensor],
    optimizer: torch.optim.Optimizer,
    budget: Budget,
    kind: Outputs,
    advance: Callable[[float, float], None],
    highest_rate: Callable[[bool], float],
) -> Tensor:
    """Take steps until the budget is spent; return the loss of each `[steps]`, on the CPU."""
    before = [buffer.clone() for buffer in module.buffers()]
    rate = highest_rate(False)
    losses: list[Tensor] = []
    read: list[float] = []
    device = pool.targets.device
    several = together(module)

    def look(share: float) -> None:
        fresh = torch.stack(losses).cpu()
        losses.clear()
        advance(share, last_finite(fresh, len(read)))
        read.extend(fresh.tolist())

    step = 0
    while (share := budget.share(step)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = rate * course(share, step)
        chosen = several.part(next(orders)).to(device, non_blocking=True)
        optimizer.zero_grad(set_to_none=True)
        answer = logits_of(call(module, tuple(tensor[chosen] for tensor in pool.inputs)))
        error = loss(answer, pool.targets[chosen], kind)
        error.backward()
        optimizer.step()
        losses.append(several.mean(error.detach()))
        if step == 0 and any(
            not torch.equal(*pair) for pair in zip(before, module.buffers(), strict=True)
        ):
            # Running statistics were renewed from those of the batch.
            rate = highest_rate(True)
        step += 1
        if step % READ_EVERY == 0:
            look(share)
    if losses:
        look(1.0)
    check_weights(module)
    return torch.tensor(read)


def _kind(targets: Tensor, task: Task | None) -> Outputs:
    kind = kind_of(targets.shape, task)
    if kind == "logits" and (targets.dim() != 2 or targets.shape[1] < 2):
        raise OptionError(
            f"outputs {list(targets.shape[1:])} per input are no class logits",
            where="task=Classification()",
            why="only logits [b, k] of two or more classes are defined up to a constant",
            how="pass task=Regression()",
        )
    return kind


def _orders(count: int, batch: int, seed: int) -> Iterator[Tensor]:
    """Yield indices `[b]` of a pool of `count`, in a new random order on each pass.

    A smaller remainder of a pass is dropped; a pool smaller than a batch makes one batch.
    """
    generator = torch.Generator().manual_seed(seed)
    size = min(batch, count)
    while True:
        order = torch.randperm(count, generator=generator)
        yield from order[: count - count % size].split(size)


def _optimizer(module: nn.Module, rate: float, decay: float) -> torch.optim.Optimizer:
    trained = trainable(module)
    matrices = [parameter for parameter in trained if parameter.dim() > 1]
    others = [parameter for parameter in trained if parameter.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
    # One kernel for all parameters: small networks spend a third of a step in the loop over them.
    fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in trained)
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=rate, fused=fused)
