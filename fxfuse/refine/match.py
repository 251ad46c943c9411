"""Match a network to an ensemble without labels.

match: ask the members about a pool of inputs → short trials find the learning rate → steps until
the budget is spent → the best state on inputs that nothing was trained on

Notation of shapes: n inputs, b batch, * any further dimensions.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fxfuse.activations.augment import Augment, default_augment
from fxfuse.activations.calibration import CalibrationBatches
from fxfuse.common.options import Options, check_type
from fxfuse.errors import InputError, OptionError
from fxfuse.refine.batch import try_call
from fxfuse.refine.infer_task import task_of_answer
from fxfuse.refine.judge import Asked, Judge, Measured, ask_members, compare, copied, divided
from fxfuse.refine.modes import (
    check_teachers,
    copies,
    device_of,
    evaluating,
    restore,
    seeded,
    trainable,
)
from fxfuse.refine.parallel import together
from fxfuse.refine.pool import Teacher
from fxfuse.refine.schedule import SHARE_OF_POOL, Budget
from fxfuse.refine.task import Task, as_task
from fxfuse.refine.trainer import Trainer, fitting_batch, optimizer_of
from fxfuse.refine.trials import find_settings
from fxfuse.refine.watch import bar

if TYPE_CHECKING:
    from rich.progress import Progress

_STEPS, _BATCH = 300, 64
#: Share of the inputs of `match` that choose, and as many that accept; fewer inputs than this all
#: do both, and what is trained on them, too.
_HELD_OUT, _FEW = 0.2, 32
#: Shares of the run after which the network is compared with the best one so far.
_LOOKS = (0.25, 0.5, 0.75)
#: Of a budget in seconds, what the looks may take, and steps that there should be at least.
_SHARE_OF_LOOKS, _LEAST_STEPS = 0.1, 100
#: Steps of which there is time for one more than it takes.
_FEW_STEPS = 20
#: Of a budget in seconds, what one call of all members may take where it can be smaller.
_OF_SECONDS = 0.01
#: A budget in seconds is exceeded by this factor at most.
_OVER = 1.3


@dataclass(frozen=True)
class Match(Options):
    """Matching: label-free training to answer like the ensemble.

    Attributes:
        steps: Budget in optimiser steps, not counting the short trials. 300 if `seconds` is not
            given either.
        seconds: Budget in CPU seconds of this process, all threads together, with everything that
            matching does. The result depends on the machine. Only a budget in steps is reproducible
            bit for bit.
        batch: Inputs per step, 2 or more. None: 64, or fewer where one step on them takes much
            memory, or so long that `seconds` would leave no hundred steps.
        learning_rate: Highest learning rate. None: short trials find it, from 3e-3 down to 1e-5.
        weight_decay: Weight decay of parameters with two dimensions or more; others do not decay.
        augment: Function of (inputs `[b, *]`, CPU generator) that returns a copy; needs a single
            input tensor. True: `shift_and_mix` for floating images `[n, c, h, w]` and signals
            `[n, c, l]` that are not one-hot, no copies of all others. False: no copies. Inputs that
            judge, without labels, get a copy each, too, which counts as much as the input.
        freeze: Whether batch normalisation keeps its statistics, and dropout stays off, while
            training. None: the trials decide.
        seed: Seed of all random numbers; torch's global generators are left as they were.
        log: Function of (step, loss) that is called every 20 steps and after the last one, for
            TensorBoard and the like; in `fuse`, for each network that is matched.
    """

    steps: int | None = None
    seconds: float | None = None
    batch: int | None = None
    learning_rate: float | None = None
    weight_decay: float = 1e-4
    augment: bool | Augment = True
    freeze: bool | None = None
    seed: int = 0
    log: Callable[[int, float], object] | None = None

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
        if not self.weight_decay >= 0:
            raise OptionError(
                f"weight_decay must be at least 0, got {self.weight_decay}",
                how="pass 0 for none, or leave it out",
            )
        if self.batch is not None and self.batch < 2:
            raise OptionError(
                f"batch must be at least 2, got {self.batch}",
                why="normalisation in training takes its statistics from a batch of two or more",
                how="pass a batch of 2 or more",
            )


class TooFewSeconds(OptionError):
    """A budget in seconds leaves no time for one step."""


@dataclass(frozen=True)
class MatchReport:
    """What a matching run did.

    Attributes:
        steps: Optimiser steps, without those of the trials.
        first_loss: Loss of the first step, on its batch.
        last_loss: Loss of the last step, on its batch.
        seconds: CPU seconds of this process, all threads together; the members' answers included.
        pool: Inputs and augmented copies that the members answered.
        batch: Inputs per step.
        learning_rate: Highest learning rate.
        frozen: Whether batch normalisation kept its statistics.
        trials: Learning rates that were tried, each with the distance that it led to.
        before: How far the start was from the ensemble, in the task's unit: by `match`, on inputs
            that nothing is trained or chosen on; in a result of `fuse`, on the inputs that chose
            the state, so `FusionResult.history` is what says whether it is an improvement.
        after: The same of the network that is left; never above `before`.
        kept: Whether what was trained is left; False: the start, which it has brought no closer.
    """

    steps: int
    first_loss: float
    last_loss: float
    seconds: float
    pool: int
    batch: int
    learning_rate: float
    frozen: bool
    trials: tuple[tuple[float, float], ...]
    before: float
    after: float
    kept: bool


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
    """Train `module` in place to answer like the ensemble of the members; no labels are needed.

    The members are asked once about a pool: the inputs, and augmented copies of them. AdamW, with a
    short warm-up and a cosine to zero, minimises the task's loss. A fifth of the inputs is held
    out: one half chooses the learning rate and the best state on the way, the other accepts that
    state only if it is closer to the ensemble than the start, beyond the uncertainty of the
    comparison. With fewer than 32 inputs all of them do everything, and an improvement is then no
    evidence. The module is left in eval mode.

    Where several processes train one network (DDP, `fully_shard`), each calls with the same
    arguments, asks the members itself and takes its part of every batch.

    Args:
        module: The network, of the members' input and output shapes.
        members: The networks to match, run in eval mode and never changed, except that they are
            moved to `device`.
        inputs: Unlabelled inputs `[n, *]`, a tuple of positional or a mapping of keyword inputs
            with the same n.
        options: Budget, batch, rate, augmentation and seed.
        task: What the output means. None: outputs `[b, k]`, k > 1, are logits, others values.
        progress: True shows a bar on stderr; a `rich.progress.Progress` gets a task of its own.
        device: Where to train; None stays where the module is. The module is moved in place.

    Returns:
        Steps, losses, time, rate, and how far start and result are from the ensemble.

    Raises:
        MemberError: There are no members, or the module is among them.
        InputError: Inputs are missing or unfit.
        OptionError: The task does not fit the outputs, the seconds are too few for one step, or a
            budget in seconds, or a batch without equal parts, for several processes.
        RefineError: A loss or weight is not finite.
    """
    check_type("module", module, nn.Module, how="pass the network to train, such as result.module")
    options, task = options or Match(), as_task(task)
    if options.seconds is not None and together(module).groups:
        raise OptionError(
            "A budget in seconds is for one process.",
            where="seconds",
            why="processes take their steps together, and seconds end at another step in each",
            how="pass steps= instead",
        )
    check_teachers(module, members, "members")
    trainable(module)
    calibration = CalibrationBatches.plain(inputs, options.batch or _BATCH)
    augment = augment_of(options, calibration)
    target = device_of(module, device)
    module.to(target)
    calibration = calibration.moved(target)
    # The first optimiser of a process imports torch's compiler, which is no part of matching.
    optimizer_of(module, 1.0, 0.0)
    begin = time.process_time()
    with evaluating(members, target):
        fitting = choosing = accepting = calibration
        if calibration.size >= _FEW:
            fitting, choosing, accepting = divided(calibration, _HELD_OUT, options.seed)
        if task is None:
            (args, kwargs), *_ = fitting.batches
            with torch.no_grad():
                task = task_of_answer(try_call(members[0], args, "member 0", kwargs))
        asked = ask_members(task, members, choosing, copied(choosing, augment))
        task = task.prepared(asked.wanted, asked.members)
        final = judge = Judge(task, asked)
        if accepting is not choosing:
            final = Judge(task, ask_members(task, members, accepting, copied(accepting, augment)))
        module.eval()
        before = final.measure(module)
        start = copies(module)
        report = train(module, members, fitting, judge, options, progress=progress, since=begin)
        after = final.measure(module)
    verdict = compare(after, before, options.seed)
    kept = report.kept and (verdict.better or (final is judge and verdict.gain > 0))
    if not kept:
        restore(module, start)
    return MatchReport(
        **{
            **vars(report),
            "before": before.mean,
            "after": after.mean if kept else before.mean,
            "kept": kept,
            "seconds": time.process_time() - begin,
        }
    )


def train(
    module: nn.Module,
    members: Sequence[nn.Module],
    fitting: CalibrationBatches,
    judge: Judge,
    options: Match,
    *,
    progress: bool | Progress = False,
    since: float | None = None,
    known: Asked | None = None,
) -> MatchReport:
    """Train a network, and leave it at the state that the judge finds best, the start included.

    Args:
        module: The network, in eval mode.
        members: The networks to match, in eval mode and on the same device.
        fitting: The inputs to train on.
        judge: Chooses between states, on other inputs.
        options: Budget, batch, rate, augmentation and seed.
        progress: As in `match`.
        since: When the budget began, as `time.process_time()` says; None: now.
        known: What the members answer to `fitting`, if they were asked already.

    Raises:
        OptionError: The seconds are too few for one step.
        RefineError: A loss or weight is not finite.
    """
    if fitting.undivided:
        raise InputError(
            "matching draws single inputs, and these calls cannot be divided",
            where="calibration inputs",
            why="their tensors differ in length, and the network answers a part of the rows "
            "otherwise than within the whole",
            how="pass refine=[Refit()], or make dimension 0 of each input the batch",
        )
    target = device_of(module, None)
    steps = _STEPS if options.steps is None and options.seconds is None else options.steps
    budget = Budget(steps, options.seconds, since)
    begin = time.process_time()
    start = judge.measure(module)
    look_cost = time.process_time() - begin
    chunk = fitting.unit if fitting.fixed else options.batch or _BATCH
    augment = augment_of(options, fitting)
    teacher = Teacher(members, judge.task, augment, chunk, options.seed, target)
    pool = teacher.pool(
        fitting,
        drawn=None if steps is None else steps * chunk,
        enough=lambda: budget.is_over(SHARE_OF_POOL),
        patience=_OF_SECONDS * budget.left(),
        known=None if known is None else known.wanted,
    )
    trainer = Trainer(module, pool, judge.task, chunk, options.weight_decay, options.seed)
    with seeded(options.seed, target), bar(progress, "matching", 1.0) as advance:
        if options.batch is None and not fitting.fixed and not trainer.several.groups:
            trainer.batch = _batch(trainer, budget, look_cost)
        _check_affordable(trainer, budget, look_cost)
        best = Best(trainer, judge, start)
        settings = find_settings(trainer, judge, options, budget, look_cost)
        looks = _looks(budget, look_cost)
        budget.start_training(look_cost)

        def look(share: float, loss: float) -> None:
            advance(share, loss)
            if options.log is not None:
                options.log(trainer.taken, loss)
            if looks and share >= looks[0] and share < 1:
                while looks and share >= looks[0]:
                    looks.pop(0)
                best.consider()

        losses = trainer.run(budget.share, settings.rate, frozen=settings.frozen, look=look)
        best.consider()
        kept = best.settle()
    first, last = float(losses[0]), float(losses[-1])
    return MatchReport(
        len(losses),
        first,
        last,
        budget.spent(),
        pool.size,
        min(trainer.batch, pool.size),
        settings.rate,
        settings.frozen,
        settings.tried,
        start.mean,
        best.found.mean,
        kept,
    )


def augment_of(options: Match, calibration: CalibrationBatches) -> Augment | None:
    """Return what makes copies of these inputs, if anything does.

    Raises:
        OptionError: It is a function of one tensor, and the inputs are others.
    """
    if options.augment is True:
        return default_augment(calibration.batches[0])
    args, kwargs = calibration.batches[0]
    if options.augment and (kwargs or len(args) != 1):
        raise OptionError(
            f"augment works with one input tensor, got {len(args) + len(kwargs)}",
            where="augment",
            why="it maps one tensor to another",
            how="leave augment out, and add augmented copies to the inputs",
        )
    return options.augment or None


class Best:
    """The best state of a network so far, by the judge."""

    def __init__(self, trainer: Trainer, judge: Judge, start: Measured) -> None:
        self._trainer, self._judge = trainer, judge
        self.found = start
        self._tensors = copies(trainer.module)
        self._changed = False

    def consider(self) -> None:
        """Keep the network's state if it is better."""
        self._trainer.module.eval()
        now = self._judge.measure(self._trainer.module)
        if now.cost < self.found.cost:
            self.found, self._tensors, self._changed = now, copies(self._trainer.module), True

    def settle(self) -> bool:
        """Leave the network at the best state; returns whether that is not the start."""
        restore(self._trainer.module, self._tensors)
        return self._changed


def _batch(trainer: Trainer, budget: Budget, look: float) -> int:
    """Inputs per step, by memory and by the time that there is.

    A step on twice as many inputs is measured, not foreseen: where it takes hardly longer, it pays.
    """
    batch = 2
    seconds, size = trainer.cost(batch)
    most = fitting_batch(size, min(_BATCH, max(2, trainer.pool.size)))
    if budget.seconds is None:
        trainer.seconds_per_input = seconds
        return most

    def affordable(batch: int, seconds: float, steps: int = _LEAST_STEPS) -> bool:
        return steps * batch * seconds <= budget.left() - look

    # The first step also pays for what is done once; where it is short, it is measured again.
    if not affordable(batch, seconds) and affordable(batch, seconds, _FEW_STEPS):
        seconds = min(seconds, trainer.cost(batch)[0])
    while 2 * batch <= most and affordable(batch, seconds):
        further, _ = trainer.cost(2 * batch)
        if not affordable(2 * batch, further):
            break
        batch, seconds = 2 * batch, further
    trainer.seconds_per_input = seconds
    return batch


def _check_affordable(trainer: Trainer, budget: Budget, look: float) -> None:
    """Check that the seconds are enough for a step and a look at what came of it."""
    if budget.seconds is None:
        return
    needed = budget.spent() + trainer.batch * trainer.seconds_per_input + look
    if needed > _OVER * budget.seconds:
        raise TooFewSeconds(
            f"{budget.seconds:g} seconds are too few for one step",
            where="seconds",
            why=f"asking the members, one step on {trainer.batch} inputs and a look at the result "
            f"take about {needed:.3g} CPU seconds",
            how=f"pass seconds={needed * 4:.2g} or more, or fewer or smaller inputs",
        )


def _looks(budget: Budget, look: float) -> list[float]:
    """Shares of the run after which there is time for a look."""
    left = budget.left()
    if left == float("inf"):
        return list(_LOOKS)
    return list(_LOOKS) if len(_LOOKS) * look <= _SHARE_OF_LOOKS * left else []
