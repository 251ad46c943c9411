"""The judge: inputs that no fit has seen, and whether one network is better on them than another.

Calibration inputs are divided once: most of them fit, some choose between networks, and others
accept what was chosen. What was fitted or chosen on an input is never accepted on it.

Notation of shapes: n inputs, * any further dimensions.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fxfuse.activations.augment import Augment
from fxfuse.activations.calibration import (
    CalibrationBatches,
    count_rows,
    join_rows,
    pick_rows,
)
from fxfuse.errors import FxfuseError, InputError, MemberError, OptionError, RefineError
from fxfuse.graph.torch_compat import pytree
from fxfuse.refine.batch import try_call
from fxfuse.refine.parallel import reshard
from fxfuse.refine.task import Answer, Task, check_answers

#: How sure the judge is: the share of resampled differences that must be improvements.
CONFIDENCE = 0.95
#: Resamples of the bootstrap.
_RESAMPLES = 2000
#: Numbers of resampled inputs that are held at a time.
_AT_A_TIME = 4_000_000

#: The user's own metric: a network in eval mode → a number, higher is better.
Metric = Callable[[nn.Module], float]


@dataclass(frozen=True)
class Asked:
    """Inputs, and what the ensemble and its members answer to them.

    Attributes:
        calibration: The inputs.
        members: What each member answers, `[n, *]`.
        wanted: What the ensemble answers, as the task's distance needs it.
        copied: Whether the second half of the inputs are copies of the first half.
    """

    calibration: CalibrationBatches
    members: tuple[Answer, ...]
    wanted: Answer
    copied: bool = False

    def and_also(self, others: Asked) -> Asked:
        """These inputs and others, with what was answered to them; copies are inputs as well."""
        both = self.calibration.together(others.calibration)
        members = zip(self.members, others.members, strict=True)
        wanted = join_rows([self.wanted, others.wanted])
        return Asked(both, tuple(join_rows(pair) for pair in members), wanted)


@dataclass(frozen=True)
class Measured:
    """What a network is worth on inputs that judge.

    Attributes:
        each: How far it is from the ensemble on each input, float64 `[n]`; smaller is better.
        metric: What the user's own metric says of it, higher is better; None without one.
    """

    each: Tensor
    metric: float | None = None

    @property
    def mean(self) -> float:
        """The mean distance."""
        return float(self.each.mean())

    @property
    def cost(self) -> float:
        """What is compared where only one number counts: smaller is better."""
        return self.mean if self.metric is None else -self.metric


@dataclass(frozen=True)
class Verdict:
    """Whether a network is better than the one there was.

    Attributes:
        better: Whether it is, beyond the uncertainty of the comparison.
        gain: Mean of the paired differences: how much closer it is to the ensemble.
        low: Lower end of the interval of the gain, at `CONFIDENCE` on one side.
        high: Upper end of it.
    """

    better: bool
    gain: float
    low: float
    high: float


def compare(new: Measured, old: Measured, seed: int = 0) -> Verdict:
    """Say whether `new` is better than `old`, by a paired bootstrap over the inputs.

    Efron and Tibshirani, "An introduction to the bootstrap" (1993), chapter 13: the percentile
    interval of the mean difference. With a metric of the user's own, that number alone decides.
    """
    if new.metric is not None and old.metric is not None:
        gain = new.metric - old.metric
        return Verdict(gain > 0, gain, gain, gain)
    difference = (old.each - new.each).double().cpu()
    gain, count = float(difference.mean()), len(difference)
    if count < 2:
        return Verdict(False, gain, -float("inf"), float("inf"))
    means = resampled(difference[:, None], _RESAMPLES, seed)[:, 0]
    low, high = means.quantile(torch.tensor([1 - CONFIDENCE, CONFIDENCE], dtype=means.dtype))
    return Verdict(float(low) > 0, gain, float(low), float(high))


def resampled(columns: Tensor, resamples: int, seed: int = 0) -> Tensor:
    """Means over resamples of the inputs, drawn with replacement, `[n, c]` → `[resamples, c]`."""
    count, found = len(columns), []
    generator, step = torch.Generator().manual_seed(seed), max(1, _AT_A_TIME // count)
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        drawn = torch.randint(count, (rows, count), generator=generator)
        times = columns.new_zeros(rows, count).scatter_add_(
            1, drawn, columns.new_ones(1, 1).expand(rows, count)
        )
        found.append(times @ columns / count)
    return torch.cat(found)


def greedy_order(count: int, cost: Callable[[Sequence[int]], float]) -> list[int]:
    """Members `0` to `count - 1`, each the one that costs least together with those before it."""
    order: list[int] = []
    while len(order) < count:
        left = {i: cost([*order, i]) for i in range(count) if i not in order}
        order.append(min(left, key=lambda i: left[i]))
    return order


def answers_of(
    task: Task, module: nn.Module, calibration: CalibrationBatches, name: str = "the network"
) -> Answer:
    """What a network in eval mode, called `name` in messages, answers to all inputs."""
    found = []
    with torch.no_grad():
        for args, kwargs in calibration.batches:
            answer = task.read(try_call(module, args, name, kwargs))
            found.append(pytree.tree_map(_kept, answer))
    return join_rows(found)


def _kept(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


class Judge:
    """Measures networks on inputs that no fit has seen.

    Args:
        task: What the output means.
        asked: The inputs; where they have labels, the loss on these judges instead of the ensemble.
        metric: The user's own metric, if any, which then decides.
    """

    def __init__(self, task: Task, asked: Asked, metric: Metric | None = None) -> None:
        self.task, self.asked, self.metric = task, asked, metric
        labels = asked.calibration.labels
        self._labels = torch.cat(labels) if labels else None

    def measure(self, module: nn.Module) -> Measured:
        """What a network in eval mode is worth."""
        answer = answers_of(self.task, module, self.asked.calibration)
        found = self.measured(answer, module)
        reshard(module)
        return found

    def measured(self, answer: Answer, module: nn.Module | None = None) -> Measured:
        """What answers are worth; `module` gave them."""
        with torch.no_grad():
            answer, each = self.task.exact(answer), None
            if self._labels is not None:
                each = self.task.label_loss(answer, self._labels)
            if each is None:
                each = self.task.distance(answer, self.asked.wanted)
            each = each.double()
        if self.asked.copied:
            # An input and its copy are one draw of the bootstrap.
            each = each.unflatten(0, (2, -1)).mean(0)
        # What cannot be compared is as far away as can be.
        each = torch.where(each.isfinite(), each, torch.full_like(each, torch.finfo().max))
        known = None if self.metric is None or module is None else ask(self.metric, module)
        return Measured(each.cpu(), known)


def ask(metric: Metric, module: nn.Module) -> float:
    """Call the user's own metric.

    Raises:
        OptionError: It raises, or returns no finite number.
    """
    try:
        with torch.no_grad():
            value = float(metric(module))
    except FxfuseError:
        raise
    # It is the user's function: anything may come out of it.
    except Exception as error:
        raise OptionError(
            "evaluate raises an error",
            where="evaluate",
            why=f"{type(error).__name__}: {' '.join(str(error).split())}",
            how="evaluate is called with a network in eval mode, and returns one number, higher is "
            "better",
        ) from error
    if value != value or value in (float("inf"), -float("inf")):
        raise OptionError(
            f"evaluate returns {value}",
            where="evaluate",
            why="networks are compared by this number",
            how="return a finite number, higher is better",
        )
    return value


def copied(calibration: CalibrationBatches, augment: Augment | None) -> CalibrationBatches | None:
    """Return an augmented copy of each input that judges, always the same one; None: no copies.

    Members agree on inputs that they were trained on more than on others, so these alone show
    little of what is to be learnt. Where there are labels, a copy has none.
    """
    if augment is None or calibration.labels:
        return None
    generator = torch.Generator().manual_seed(0)
    return replace(calibration, batches=tuple(calibration.copied(augment, generator)))


def ask_members(
    task: Task,
    members: Sequence[nn.Module],
    calibration: CalibrationBatches,
    copies: CalibrationBatches | None = None,
) -> Asked:
    """Ask all members about inputs, and combine what they answer.

    Args:
        task: What they answer means.
        members: Networks in eval mode.
        calibration: The inputs.
        copies: A copy of each of them, to ask about as well.

    Raises:
        OptionError: The task does not fit what they answer.
        InputError: A member rejects the inputs, or answers NaN or infinity.
        MemberError: The members' outputs have different shapes.
    """
    answers: list[Answer] = []
    if copies is not None:
        calibration = calibration.together(copies)
    for number, member in enumerate(members):
        answers.append(answers_of(task, member, calibration, f"member {number}"))
        check_alike(answers, number, calibration.size)
        task.check(answers[-1])
        check_answers(answers[-1], f"member {number}")
    _, kwargs = calibration.whole
    wanted = task.target([task.exact(answer) for answer in answers], kwargs)
    return Asked(calibration, tuple(answers), wanted, copies is not None)


def check_alike(answers: Sequence[Answer], number: int, count: int) -> None:
    """Check that the newest member answers each input, with tensors of the others' shapes."""
    first, last = (
        [x for x in pytree.tree_leaves(a) if isinstance(x, Tensor)]
        for a in (answers[0], answers[-1])
    )
    if number == 0 and any(x.dim() == 0 or len(x) != count for x in first):
        shape = next(list(x.shape) for x in first if x.dim() == 0 or len(x) != count)
        raise MemberError(
            f"member 0 returns an output {shape} for {count} inputs",
            where="members",
            why="each input needs an output of its own",
            how="wrap the networks so that dimension 0 of their output is the batch",
        )
    for one, other in zip(first, last, strict=False):
        if one.shape != other.shape:
            raise MemberError(
                "the members return outputs of different shapes",
                where=f"member 0 {list(one.shape)}, member {number} {list(other.shape)}",
                why="the network is matched to all of them together",
                how="use members with the same classes and output size",
            )


def check_task(task: Task, members: Sequence[nn.Module], calibration: CalibrationBatches) -> None:
    """Check on a few inputs that a task fits the outputs, before any work starts.

    Raises:
        OptionError: It does not.
        InputError: The labels do not fit the task, or an answer is NaN or infinite.
    """
    args, kwargs = calibration.batches[0]
    with torch.no_grad():
        answer = task.read(try_call(members[0], args, "member 0", kwargs))
    task.check(answer)
    check_answers(answer, "member 0")
    _check_inputs_apart(task, members[0], calibration, answer)
    wanted = task.target([answer] * len(members), kwargs)
    far = task.distance(answer, wanted)
    count = next(len(x) for x in pytree.tree_leaves(answer) if isinstance(x, Tensor))
    if far.shape != (count,):
        raise RefineError(
            f"the distance of {count} inputs is {list(far.shape)}",
            where=f"task={task}",
            how="make dimension 0 of the output the batch",
        )
    for labels in calibration.labels:
        # Of every batch, as what is wrong with the last one should not show at the end.
        rows = torch.zeros(len(labels), dtype=torch.long)
        if task.label_loss(pick_rows(answer, rows), labels) is None:
            raise InputError(
                "there is no use for labels",
                where="labels of the calibration inputs",
                why=f"{task} has no loss on labels",
                how="pass the inputs alone, or Calibration(inputs, evaluate=...) with your own "
                "metric, or task=fxfuse.Classification(...) if they are class numbers",
            )


def _check_inputs_apart(
    task: Task, member: nn.Module, calibration: CalibrationBatches, answer: Answer
) -> None:
    """Check that what is answered to an input has one shape, with however many it comes.

    `answer` is that to the first batch. Networks that compare the inputs of a batch with each other
    return `[b, b]`.
    """
    other = 3 if count_rows(calibration.batches[0]) == 2 else 2
    if calibration.unit > 1 or calibration.size < other:
        return
    args, kwargs = calibration.rows(slice(0, other), other).batches[0]
    with torch.no_grad():
        shorter = task.read(try_call(member, args, "member 0", kwargs))
    pairs = zip(pytree.tree_leaves(answer), pytree.tree_leaves(shorter), strict=True)
    for one, two in pairs:
        if isinstance(one, Tensor) and one.shape[1:] != two.shape[1:]:
            raise OptionError(
                "an output's shape depends on how many inputs are in the batch",
                where=f"output {list(one.shape)} for {len(one)} inputs, and {list(two.shape)} for "
                f"{len(two)}",
                why="the distance to the ensemble is measured for each input by itself",
                how="name outputs that hold one answer for each input, such as task={"
                "'image_embeds': fxfuse.Embedding()}, or wrap the networks so that they return "
                "these",
            )


class Stopwatch:
    """CPU seconds of this process, all threads together, since the last look."""

    def __init__(self) -> None:
        self._last = time.process_time()

    def lap(self) -> float:
        """The seconds since the last call."""
        now = time.process_time()
        took, self._last = now - self._last, now
        return took


def divided(
    calibration: CalibrationBatches, share: float, seed: int | None = None
) -> tuple[CalibrationBatches, CalibrationBatches, CalibrationBatches]:
    """The inputs that fit, those that choose, and those that accept: two halves of `share`.

    The parts have no input in common; with a share of 0 each is the whole. With a seed they are
    drawn in a random order.
    """
    if share == 0:
        return calibration, calibration, calibration
    if seed is not None:
        calibration = calibration.shuffled(seed)
    fitting, rest = calibration.split(share)
    choosing, accepting = rest.split(0.5)
    return fitting, choosing, accepting


def folds(
    calibration: CalibrationBatches, count: int
) -> list[tuple[CalibrationBatches, CalibrationBatches]]:
    """For each of `count` parts of the inputs: all others, and the part."""
    parts = calibration.parts(count)
    found = []
    for i, part in enumerate(parts):
        first, *others = (p for j, p in enumerate(parts) if j != i)
        found.append((first.together(*others), part))
    return found
