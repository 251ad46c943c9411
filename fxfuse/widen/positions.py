"""Layouts as arrays of positions, on which data movement runs, and back.

Beside each element's position runs the number of its copy: copy numbers of the grown dimensions are
digits of one number.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch

from fxfuse.labels import Value
from fxfuse.layout import Layout
from fxfuse.widen.state import Layouts

#: Base of the numbers of copies (digit 0: no copy).
_BASE = 1 << 20


def positions_of(value: Value, layouts: Layouts) -> tuple[torch.Tensor, torch.Tensor]:
    """For each element: the member's element of which it is a copy, and the copies' numbers.

    Args:
        value: A tensor at the members' width.
        layouts: The layouts of its dimensions that grow.

    Returns:
        Two int64 tensors of the wide shape.
    """
    place = torch.arange(int(np.prod(value.shape))).reshape(value.shape)
    copy = torch.zeros(value.shape, dtype=torch.int64)
    for digit, (dim, layout) in enumerate(layouts.items()):
        source = torch.from_numpy(layout.source)
        place, copy = place.index_select(dim, source), copy.index_select(dim, source)
        line = torch.from_numpy(layout.copy) + 1
        copy = copy + _along(line * _BASE**digit, dim, value.rank)
    return place, copy


def layouts_of(narrow: torch.Tensor, moved: torch.Tensor, copies: torch.Tensor) -> Layouts | None:
    """Layouts of a moved tensor, or None when it is no tensor of whole copies.

    Args:
        narrow: Positions moved at the members' width.
        moved: Positions moved at the wide width.
        copies: The copies' numbers, moved alike.
    """
    result: Layouts = {}
    if moved.dim() != narrow.dim():
        return None
    grown = [d for d in range(narrow.dim()) if moved.shape[d] != narrow.shape[d]]
    rebuilt, expected = narrow, torch.zeros_like(narrow)
    for dim in grown:
        head = narrow.movedim(dim, 0).reshape(narrow.shape[dim], -1)[:, 0]
        line = moved.movedim(dim, 0).reshape(moved.shape[dim], -1)[:, 0].contiguous()
        varying = _varying_digits(copies.movedim(dim, 0).reshape(moved.shape[dim], -1)[:, 0])
        if len(varying) != 1:
            return None
        digit, copy = varying[0]
        # The second place of a neuron is the second place of each of its copies.
        ordered, order = head.sort(stable=True)
        found = torch.searchsorted(ordered, line) + _again(line, copy)
        source = order[found.clamp(max=len(head) - 1)]
        if not torch.equal(head[source], line):
            return None
        result[dim] = Layout(source.numpy(), copy.numpy() - 1)
        rebuilt = rebuilt.index_select(dim, source)
        expected = expected.index_select(dim, source)
        expected = expected + _along(copy * _BASE**digit, dim, narrow.dim())
    if torch.equal(rebuilt, moved) and torch.equal(expected, copies):
        return result
    return None


def _along(line: torch.Tensor, dim: int, rank: int) -> torch.Tensor:
    return line.reshape([-1 if d == dim else 1 for d in range(rank)])


def _varying_digits(line: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
    """The digits in which the numbers of a line differ."""
    found, digit = [], 0
    while bool(line.any()):
        digits = line % _BASE
        if bool((digits != digits[0]).any()):
            found.append((digit, digits))
        line, digit = line // _BASE, digit + 1
    return found


def _again(line: torch.Tensor, copy: torch.Tensor) -> torch.Tensor:
    """How often the same neuron of the same copy stood at an earlier place."""
    pairs, seen = list(zip(line.tolist(), copy.tolist(), strict=True)), Counter[tuple[int, int]]()
    again = []
    for pair in pairs:
        again.append(seen[pair])
        seen[pair] += 1
    return torch.tensor(again)
