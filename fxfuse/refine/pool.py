"""The pool that a network is matched on: unlabelled inputs, augmented copies, what members answer.

Notation of shapes: n inputs, p pool, k classes, * any further dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxfuse.activations.augment import Augment
from fxfuse.errors import RefineError
from fxfuse.refine.batch import logits_of, try_call

# Passes over the inputs that the pool holds at most: the inputs, then augmented copies; and how
# often each entry is to be used at least: a member's answer costs a third of a step on one input.
_PASSES, _USES = 12, 3
# The share of the inputs that is held out to judge by, how many at least and at most, and how many
# copies of each are asked about.
_HELD_OUT, _LEAST_HELD_OUT, _MOST_HELD_OUT, _COPIES = 0.1, 8, 128, 3


@dataclass(frozen=True)
class Pool:
    """What a network is asked, and what it should answer.

    Attributes:
        inputs: Positional inputs, each `[p, *]`.
        targets: Mean of the members' outputs `[p, *]`, float32 or wider.
    """

    inputs: tuple[Tensor, ...]
    targets: Tensor

    def __len__(self) -> int:
        """Return p."""
        return len(self.targets)


@dataclass(frozen=True)
class Teacher:
    """The members, and how they are asked.

    Attributes:
        members: Networks in eval mode that return logits, or an object with a field of that name.
        augment: Makes copies of inputs; None makes none.
        batch: Inputs per batch.
        seed: Seed of the order and of the copies.
        device: Where the members are.
    """

    members: Sequence[nn.Module]
    augment: Augment | None
    batch: int
    seed: int
    device: torch.device


def check_inputs(inputs: Any, augment: Augment | None) -> tuple[Tensor, ...]:
    """Return positional inputs as a tuple.

    Raises:
        RefineError: They are no tensors, too few, of different lengths, or cannot be augmented.
    """
    given = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
    if not given or not all(isinstance(tensor, Tensor) and tensor.dim() for tensor in given):
        raise RefineError(
            "The inputs are no tensors with a batch dimension.",
            where=f"inputs: {', '.join(type(tensor).__name__ for tensor in given) or 'none'}",
            why="The network is matched to the members' answers on them.",
            how="Give a tensor [n, ...], or a tuple of such tensors, one for each argument.",
        )
    lengths = [len(tensor) for tensor in given]
    if len(set(lengths)) > 1:
        raise RefineError(
            f"The inputs differ in length: {lengths}.",
            where="inputs",
            why="The n-th entries of all inputs make the n-th example.",
            how="Give tensors with the same first dimension.",
        )
    if lengths[0] < 2:
        raise RefineError(
            f"{lengths[0]} inputs were given.",
            where="inputs",
            why="Normalisation in training takes its statistics from a batch of two or more.",
            how="Give some hundred unlabelled inputs.",
        )
    if augment is not None and len(given) > 1:
        raise RefineError(
            f"An augmentation was given for {len(given)} inputs.",
            where="augment",
            why="It maps one tensor, and would not know which.",
            how="Give augmented copies among the inputs, and augment=None.",
        )
    return given


def make_pool(
    teacher: Teacher,
    inputs: tuple[Tensor, ...],
    *,
    drawn: int | None,
    enough: Callable[[], bool],
) -> Pool:
    """Ask the members about the inputs and copies of them.

    Args:
        teacher: The members.
        inputs: Positional inputs, each `[n, *]`.
        drawn: How many entries will be drawn; a third of them are asked about, or all inputs if
            those are more. None is no limit.
        enough: Asked after each batch whether the pool is large enough.

    Raises:
        RefineError: The members reject the inputs, give outputs of different shapes, or such as are
            not finite.
    """
    count = len(inputs[0])
    most = None if drawn is None else min(drawn, max(count, -(-drawn // _USES)))
    turns = range(1 if teacher.augment is None else _PASSES)
    return _asked(teacher, _chunks(teacher, inputs, turns), most, enough)


def split(inputs: tuple[Tensor, ...], seed: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Inputs to train on, and others that judge; both are all of them where those are few.

    Args:
        inputs: Positional inputs, each `[n, *]`.
        seed: Seed of the choice.
    """
    count = len(inputs[0])
    held = min(max(round(_HELD_OUT * count), _LEAST_HELD_OUT), _MOST_HELD_OUT)
    if count < 4 * held:
        return inputs, inputs
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    chosen, others = order[:held], order[held:].sort().values
    return _select(inputs, others), _select(inputs, chosen)


def make_judges(
    teacher: Teacher, inputs: tuple[Tensor, ...], *, enough: Callable[[], bool]
) -> Pool:
    """Ask the members about augmented copies of inputs that nothing is trained on.

    Copies, not the inputs themselves: members that were trained on those remember the answers, and
    every one of them is then close to the ensemble there, as it is on no other input.

    Args:
        teacher: The members; without an augmentation they are asked about the inputs themselves.
        inputs: Positional inputs, each `[n, *]`.
        enough: Asked after each batch whether there are enough.

    Raises:
        RefineError: As in `make_pool`.
    """
    chosen = tuple(tensor[: 4 * _MOST_HELD_OUT] for tensor in inputs)
    turns = range(1) if teacher.augment is None else range(1, 1 + _COPIES)
    return _asked(teacher, _chunks(teacher, chosen, turns), None, enough)


def _asked(
    teacher: Teacher,
    chunks: Iterator[tuple[Tensor, ...]],
    most: int | None,
    enough: Callable[[], bool],
) -> Pool:
    """Ask about chunk after chunk, until there are enough."""
    asked: list[tuple[Tensor, ...]] = []
    answers: list[Tensor] = []
    count = 0
    with torch.no_grad():
        for chunk in chunks:
            moved = tuple(tensor.to(teacher.device) for tensor in chunk)
            answers.append(_mean(teacher.members, moved))
            asked.append(moved)
            count += len(answers[-1])
            if (most is not None and count >= most) or enough():
                break
        pool = Pool(
            tuple(torch.cat(parts) for parts in zip(*asked, strict=True)), torch.cat(answers)
        )
    if not bool(pool.targets.isfinite().all()):
        raise RefineError(
            "The members' outputs are not finite.",
            where="members",
            why="The network would be trained to give NaN or infinity.",
            how="Check the members' weights and the inputs for such values.",
        )
    return pool


def _chunks(
    teacher: Teacher, inputs: tuple[Tensor, ...], turns: range
) -> Iterator[tuple[Tensor, ...]]:
    """Yield all inputs in random order, in turns but turn 0 augmented, in batches of 2 or more."""
    generator = torch.Generator().manual_seed(teacher.seed)
    count = len(inputs[0])
    for turn in turns:
        order = torch.randperm(count, generator=generator)
        for chosen in order.tensor_split(max(1, -(-count // teacher.batch))):
            chunk = _select(inputs, chosen)
            if turn and teacher.augment is not None:
                chunk = (teacher.augment(chunk[0], generator),)
            yield chunk


def _select(inputs: tuple[Tensor, ...], chosen: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor[chosen.to(tensor.device)] for tensor in inputs)


def _mean(members: Sequence[nn.Module], chunk: tuple[Tensor, ...]) -> Tensor:
    total: Tensor | None = None
    for number, member in enumerate(members):
        answer = logits_of(try_call(member, chunk, f"Member {number}"))
        answer = answer.to(torch.promote_types(answer.dtype, torch.float32))
        if total is None:
            if answer.dim() == 0 or len(answer) != len(chunk[0]):
                raise RefineError(
                    f"Member 0 gives an output {list(answer.shape)} for {len(chunk[0])} inputs.",
                    where="members",
                    why="Each input needs an answer of its own.",
                    how="Wrap the networks so that dimension 0 of their output is the batch.",
                )
            total = answer
            continue
        if answer.shape != total.shape:
            raise RefineError(
                "The members give outputs of different shapes.",
                where=f"member 0 {list(total.shape)}, member {number} {list(answer.shape)}",
                why="Their mean is what the network is matched to.",
                how="Use members with the same classes and output size.",
            )
        total = total + answer
    assert total is not None
    return total / len(members)
