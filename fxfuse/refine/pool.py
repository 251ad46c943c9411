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
from fxfuse.errors import InputError, MemberError, OptionError
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
    """Return positional inputs as a tuple."""
    given = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
    if not given or not all(isinstance(tensor, Tensor) and tensor.dim() for tensor in given):
        raise InputError(
            "the inputs are not tensors with a batch dimension",
            where=f"inputs: {', '.join(type(tensor).__name__ for tensor in given) or 'none'}",
            why="the networks run on them in batches",
            how="pass a tensor [n, ...], or a tuple of such tensors, one for each argument",
        )
    lengths = [len(tensor) for tensor in given]
    if len(set(lengths)) > 1:
        raise InputError(
            f"the inputs differ in length: {lengths}",
            where="inputs",
            why="the n-th entries of all inputs make the n-th example",
            how="pass tensors of the same first dimension",
        )
    if lengths[0] < 2:
        raise InputError(
            f"at least 2 inputs are needed, got {lengths[0]}",
            where="inputs",
            why="normalisation computes its statistics over a batch of two or more",
            how="pass a few hundred unlabelled inputs",
        )
    if augment is not None and len(given) > 1:
        raise OptionError(
            f"augment works with one input tensor, got {len(given)}",
            where="augment",
            why="it maps one tensor to another",
            how="leave augment out, and add augmented copies to the inputs",
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
    """
    count = len(inputs[0])
    most = None if drawn is None else min(drawn, max(count, -(-drawn // _USES)))
    turns = range(1 if teacher.augment is None else _PASSES)
    return _asked(teacher, _chunks(teacher, inputs, turns), most, enough)


def split(inputs: tuple[Tensor, ...], seed: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Inputs to train on, and others that judge; both are all of them where those are few."""
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
        raise MemberError(
            "the members' outputs are not finite",
            where="members",
            why="the network would be trained to return NaN or infinity",
            how="check the members' weights and the inputs for such values",
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
        answer = logits_of(try_call(member, chunk, f"member {number}"))
        answer = answer.to(torch.promote_types(answer.dtype, torch.float32))
        if total is None:
            if answer.dim() == 0 or len(answer) != len(chunk[0]):
                raise MemberError(
                    f"member 0 returns an output {list(answer.shape)} for {len(chunk[0])} inputs",
                    where="members",
                    why="each input needs an output of its own",
                    how="wrap the networks so that dimension 0 of their output is the batch",
                )
            total = answer
            continue
        if answer.shape != total.shape:
            raise MemberError(
                "the members return outputs of different shapes",
                where=f"member 0 {list(total.shape)}, member {number} {list(answer.shape)}",
                why="the network is matched to their mean",
                how="use members with the same classes and output size",
            )
        total = total + answer
    assert total is not None
    return total / len(members)
