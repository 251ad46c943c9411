"""The pool that a network is matched on: unlabelled inputs, augmented copies, what members answer.

Notation of shapes: n inputs, p pool, * any further dimensions.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fxfuse.activations.augment import Augment
from fxfuse.activations.calibration import (
    CalibrationBatches,
    Call,
    count_rows,
    join_rows,
    pick_rows,
)
from fxfuse.graph.torch_compat import pytree
from fxfuse.refine.batch import try_call
from fxfuse.refine.judge import check_alike
from fxfuse.refine.task import Answer, Task, check_answers

# Passes over the inputs that the pool holds at most: the inputs, then augmented copies; and how
# often each entry is to be used at least: a member's answer costs a third of a step on one input.
_PASSES, _USES = 12, 3


@dataclass(frozen=True)
class Pool:
    """What a network is asked, and what it should answer.

    Attributes:
        inputs: Positional and keyword inputs, `[p, *]`.
        wanted: What the ensemble answers, `[p, *]`.
        size: p.
    """

    inputs: Call
    wanted: Answer
    size: int

    def batch(self, chosen: Tensor) -> tuple[Call, Answer]:
        """Some of the inputs, and what the ensemble answers to them."""
        return pick_rows(self.inputs, chosen), pick_rows(self.wanted, chosen)


@dataclass(frozen=True)
class Teacher:
    """The members, and how they are asked.

    Attributes:
        members: Networks in eval mode.
        task: What they answer means.
        augment: Makes copies of inputs; None makes none.
        batch: Inputs per call.
        seed: Seed of the order and of the copies.
        device: Where the members are.
    """

    members: Sequence[nn.Module]
    task: Task
    augment: Augment | None
    batch: int
    seed: int
    device: torch.device

    def pool(
        self,
        calibration: CalibrationBatches,
        *,
        drawn: int | None = None,
        enough: Callable[[], bool] = lambda: False,
        patience: float = float("inf"),
        known: Answer | None = None,
    ) -> Pool:
        """Ask the members about the inputs and copies of them.

        Args:
            calibration: The inputs.
            drawn: How many entries will be drawn; a third of them are asked about, or all inputs if
                those are more. None is no limit.
            enough: Asked after each batch whether the pool is large enough.
            patience: CPU seconds that a batch may take; batches grow from two inputs until then.
            known: What the ensemble answers to the inputs, if that is known; then only copies are
                asked about.

        Raises:
            InputError: A member rejects the inputs, or answers NaN or infinity.
            MemberError: The members' outputs have different shapes.
            OptionError: The task does not fit what they answer.
        """
        count = calibration.size
        most = None if drawn is None else min(drawn, max(count, -(-drawn // _USES)))
        asked: list[Call] = []
        answers: list[Answer] = []
        size = 0
        if known is not None:
            call = pytree.tree_map_only(Tensor, lambda x: x.to(self.device), calibration.whole)
            asked.append(call)
            answers.append(pytree.tree_map_only(Tensor, self._as_trained, known))
            size = calibration.size
        with torch.no_grad():
            for chunk in self._chunks(calibration, 0 if known is None else 1, patience):
                if size and ((most is not None and size >= most) or enough()):
                    break
                moved = pytree.tree_map_only(Tensor, lambda x: x.to(self.device), chunk)
                answers.append(self._combined(moved))
                asked.append(moved)
                size += count_rows(moved)
        return Pool(join_rows(asked), join_rows(answers), size)

    def _as_trained(self, x: Tensor) -> Tensor:
        """An answer that was kept in float64, as the loss takes it."""
        return x.to(self.device, torch.float32 if x.dtype == torch.float64 else x.dtype)

    def _chunks(
        self, calibration: CalibrationBatches, first: int, patience: float
    ) -> Iterator[Call]:
        """Yield all inputs in random order, then copies of them, in batches of 2 or more.

        The passes before the `first` one are left out.
        """
        generator = torch.Generator().manual_seed(self.seed)
        count, whole = calibration.size, calibration.whole
        for turn in range(1 if self.augment is None else _PASSES):
            order = torch.randperm(count, generator=generator)
            if turn < first:
                continue
            for chosen in self._pieces(order, patience, fixed=calibration.fixed):
                chunk = pick_rows(whole, chosen)
                if turn and self.augment is not None:
                    chunk = ((self.augment(chunk[0][0], generator),), {})
                yield chunk

    def _pieces(self, order: Tensor, patience: float, *, fixed: bool) -> Iterable[Tensor]:
        if fixed:
            return [p for p in order.split(self.batch) if len(p) == self.batch]
        if patience < float("inf"):
            return self._growing(order, patience)
        return order.tensor_split(max(1, -(-len(order) // self.batch)))

    def _growing(self, order: Tensor, patience: float) -> Iterator[Tensor]:
        """Yield parts of 2 and more, each twice as large as the last until one takes too long."""
        size = 2
        while len(order):
            end = size + (len(order) == size + 1)
            begin = time.process_time()
            yield order[:end]
            if 2 * (time.process_time() - begin) <= patience:
                size = min(2 * size, self.batch)
            order = order[end:]

    def _combined(self, chunk: Call) -> Answer:
        """What the ensemble answers to a batch."""
        args, kwargs = chunk
        answers = []
        for number, member in enumerate(self.members):
            answers.append(self.task.read(try_call(member, args, f"member {number}", kwargs)))
            check_alike(answers, number, count_rows(chunk))
            check_answers(answers[-1], f"member {number}")
        self.task.check(answers[0])
        return self.task.target(answers, kwargs)
