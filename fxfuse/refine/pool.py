"""The pool that a network is matched on: unlabelled inputs, augmented copies, what members answer.

Notation of shapes: n inputs, p pool, k classes, * any further dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxfuse.errors import RefineError
from fxfuse.refine.augment import Augment
from fxfuse.refine.batch import logits_of, try_call

# Passes over the inputs that the pool holds: the inputs, then augmented copies.
_PASSES = 4


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
    members: Sequence[nn.Module],
    inputs: tuple[Tensor, ...],
    *,
    augment: Augment | None,
    most: int | None,
    enough: Callable[[], bool],
    batch: int,
    seed: int,
    device: torch.device,
) -> Pool:
    """Ask the members, in eval mode already, about the inputs and copies of them.

    Args:
        members: Networks that return logits, or an object with a field of that name.
        inputs: Positional inputs, each `[n, *]`.
        augment: Makes copies; None keeps the pool to the inputs themselves.
        most: Entries that will be used, at most; None is no limit.
        enough: Asked after each batch whether the pool is large enough.
        batch: Inputs per batch.
        seed: Seed of the order and of the copies.
        device: Where the members are.

    Raises:
        RefineError: The members reject the inputs, give outputs of different shapes, or such as are
            not finite.
    """
    asked: list[tuple[Tensor, ...]] = []
    answers: list[Tensor] = []
    count = 0
    with torch.no_grad():
        for chunk in _chunks(inputs, augment, batch, seed):
            moved = tuple(tensor.to(device) for tensor in chunk)
            answers.append(_mean(members, moved))
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
    inputs: tuple[Tensor, ...], augment: Augment | None, batch: int, seed: int
) -> Iterator[tuple[Tensor, ...]]:
    """Yield all inputs in random order, then augmented copies, in batches of 2 or more."""
    generator = torch.Generator().manual_seed(seed)
    count = len(inputs[0])
    for turn in range(1 if augment is None else _PASSES):
        order = torch.randperm(count, generator=generator)
        for chosen in order.tensor_split(max(1, -(-count // batch))):
            chunk = tuple(tensor[chosen.to(tensor.device)] for tensor in inputs)
            if turn and augment is not None:
                chunk = (augment(chunk[0], generator),)
            yield chunk


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
