"""Augmented copies of unlabelled inputs: what a network is asked besides the inputs themselves.

Notation of shapes: b batch, c channels, * positions (length, or height and width).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional

#: Dimensions of a batch of signals [b, c, l].
_SIGNAL = 3

Augment = Callable[[Tensor, torch.Generator], Tensor]


def default_augment(call: tuple[tuple[object, ...], Mapping[str, object]]) -> Augment | None:
    """Return `shift_and_mix` for one tensor of images or signals, None for all other inputs.

    Args:
        call: Positional and keyword inputs. One-hot signals are symbols: a mixture of two of them,
            or a shift that repeats the first, is no input that a network has ever seen.
    """
    args, kwargs = call
    x = args[0] if len(args) == 1 and not kwargs else None
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() not in (3, 4):
        return None
    one_hot = bool(((x == 0) | (x == 1)).all()) and bool((x.sum(1) <= 1).all())
    return None if one_hot and x.dim() == _SIGNAL else shift_and_mix


def shift_and_mix(inputs: Tensor, generator: torch.Generator) -> Tensor:
    """Shift every input by up to one position along each axis, and mix half of them in pairs.

    Args:
        inputs: Floating `[b, c, *]`. At the border, edge values are repeated.
        generator: Source of the random numbers, on the CPU.

    Returns:
        `[b, c, *]`. A mixed input is a convex combination, of uniformly random share, of itself
        and another one of the batch.
    """
    shifted = _shift(inputs, generator)
    count = len(inputs)
    order = torch.randperm(count, generator=generator).to(inputs.device)
    share = torch.rand(count // 2, generator=generator).to(inputs)
    share = share.reshape(-1, *[1] * (inputs.dim() - 1))
    # Neighbours in a random order are never the same input.
    one, other = order[: count // 2], order.roll(1)[: count // 2]
    result = shifted.clone()
    result[one] = share * shifted[one] + (1 - share) * shifted[other]
    return result


def _shift(inputs: Tensor, generator: torch.Generator) -> Tensor:
    axes = inputs.dim() - 2
    sizes = inputs.shape[2:]
    padded = functional.pad(inputs, [1, 1] * axes, mode="replicate")
    start = torch.randint(3, (len(inputs), axes), generator=generator)
    result = torch.empty_like(inputs)
    for offsets in itertools.product(range(3), repeat=axes):
        chosen = (start == torch.tensor(offsets)).all(dim=1).to(inputs.device)
        window = padded[chosen]
        for axis, (offset, size) in enumerate(zip(offsets, sizes, strict=True), 2):
            window = window.narrow(axis, offset, size)
        result[chosen] = window
    return result
