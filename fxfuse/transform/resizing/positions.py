"""Layouts as arrays of positions, on which data movement runs, and back.

Beside each element's position runs the number of its copy: copy numbers of the grown dimensions are
digits of one number.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

import numpy as np
import torch

from fxfuse.analysis.labels import AbstractTensor
from fxfuse.errors import RewriteError
from fxfuse.transform.apply import lay_along
from fxfuse.transform.layout import Layout
from fxfuse.transform.resizing.state import Layouts

#: Base of the numbers of copies (digit 0: no copy), and how many digits int64 has room for.
_BASE, _DIGITS = 1 << 10, 6


def positions_of(value: AbstractTensor, layouts: Layouts) -> tuple[torch.Tensor, torch.Tensor]:
    """For each element, return the member's element of which it is a copy, and the copies' numbers.

    Both are int64 of the resized shape.
    """
    most = max((int(layout.copy.max(initial=0)) for layout in layouts.values()), default=0)
    if len(layouts) > _DIGITS or most + 1 >= _BASE:
        raise RewriteError(
            "the network cannot be written in this size",
            where=f"a tensor of shape {tuple(value.shape)}",
            why=f"{len(layouts)} of its dimensions grow, with up to {most + 1} copies of a unit; "
            f"{_DIGITS} dimensions and {_BASE - 2} copies are followed",
            how="choose a smaller size, or freeze some of them with Constraints",
        )
    place = torch.arange(int(np.prod(value.shape))).reshape(value.shape)
    copy = torch.zeros(value.shape, dtype=torch.int64)
    for digit, (dim, layout) in enumerate(layouts.items()):
        source = torch.from_numpy(layout.source)
        place, copy = place.index_select(dim, source), copy.index_select(dim, source)
        line = torch.from_numpy(layout.copy) + 1
        copy = copy + lay_along(line * _BASE**digit, dim, value.rank)
    return place, copy


def layouts_of(
    narrow: torch.Tensor, moved: torch.Tensor, copies: torch.Tensor, growing: Collection[int]
) -> Layouts | None:
    """Return the layouts of a moved tensor, or None when it is no tensor of whole copies.

    `narrow` are positions moved at the members' width, `moved` and `copies` positions and numbers
    of copies moved at the other; along `growing` dimensions stand units whose number changes.
    """
    result: Layouts = {}
    first = _first_place(narrow, moved)
    if first is None:
        return None
    rebuilt, expected = narrow, torch.zeros_like(narrow)
    constant = _constant_digits(copies)
    for dim in range(narrow.dim()):
        head = narrow[tuple(slice(None) if d == dim else at for d, at in enumerate(first))]
        line, numbers = (
            t.movedim(dim, 0).reshape(t.shape[dim], -1)[:, 0].contiguous() for t in (moved, copies)
        )
        varying = _varying_digits(numbers)
        changed = not torch.equal(head, line)
        if len(varying) > 1 or (changed and not varying and not constant):
            return None
        if not varying and not (constant and (changed or dim in growing)):
            continue
        # Where there is one copy of some units and none of others, no number differs.
        digit, copy = varying[0] if varying else constant.pop()
        # The second place of a neuron is the second place of each of its copies.
        ordered, order = head.sort(stable=True)
        found = torch.searchsorted(ordered, line) + _again(line, copy)
        source = order[found.clamp(max=len(head) - 1)]
        if not torch.equal(head[source], line):
            return None
        result[dim] = Layout(source.numpy(), copy.expand(len(line)).numpy() - 1)
        rebuilt = rebuilt.index_select(dim, source)
        expected = expected.index_select(dim, source)
        expected = expected + lay_along(copy.expand(len(line)) * _BASE**digit, dim, narrow.dim())
    if torch.equal(rebuilt, moved) and torch.equal(expected, copies):
        return result
    return None


def _constant_digits(copies: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
    """Return the digits, not 0, that all numbers have in common; the first of them last."""
    found, digit = [], 0
    while bool(copies.any()):
        digits = copies % _BASE
        if bool((digits == digits.max()).all()) and bool(digits.any()):
            found.append((digit, digits.reshape(-1)[:1]))
        copies, digit = copies // _BASE, digit + 1
    return found[::-1]


def _first_place(narrow: torch.Tensor, moved: torch.Tensor) -> list[int] | None:
    """Where the first element of a moved tensor is in the narrow one, if there is such."""
    if moved.dim() != narrow.dim() or not moved.numel():
        return None
    found = torch.nonzero(narrow == moved.reshape(-1)[0])
    return found[0].tolist() if len(found) else None


def _varying_digits(line: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
    """Return the digits in which the numbers of a line differ."""
    found, digit = [], 0
    while bool(line.any()):
        digits = line % _BASE
        if bool((digits != digits[0]).any()):
            found.append((digit, digits))
        line, digit = line // _BASE, digit + 1
    return found


def _again(line: torch.Tensor, copy: torch.Tensor) -> torch.Tensor:
    """Return how often the same neuron of the same copy stood at an earlier place."""
    numbers = copy.expand(len(line)).tolist()
    pairs, seen = list(zip(line.tolist(), numbers, strict=True)), Counter[tuple[int, int]]()
    again = []
    for pair in pairs:
        again.append(seen[pair])
        seen[pair] += 1
    return torch.tensor(again)
