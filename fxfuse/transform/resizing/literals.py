"""Literals of operators: reading them, rewriting them, and what they could be at the wide width."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations
from typing import Any, cast

import numpy as np
import torch
from torch import fx

from fxfuse.analysis.labels import AbstractTensor, Index
from fxfuse.analysis.rules import creation, find, movement
from fxfuse.graph.arguments import argument, argument_names
from fxfuse.graph.torch_compat import hint, pytree
from fxfuse.transform.layout import Layout
from fxfuse.transform.resizing.state import Layouts, ResizedGraph, cannot_write

aten = torch.ops.aten


@dataclass(frozen=True)
class _Scaled:
    """A symbolic size (a batch times heads, say) that grows or shrinks by a ratio."""

    size: fx.Node
    ratio: Fraction


def dimension(node: fx.Node, rank: int) -> int:
    """Return the argument `dim` of a node, not negative; -1 where it names no single dimension."""
    dim = argument(node, "dim")
    return int(dim) % rank if isinstance(dim, int) else -1


def set_arguments(wide: ResizedGraph, node: fx.Node, args: Sequence[Any]) -> None:
    """Rewrite the positional arguments of the copy of a node to one of its `candidates`."""
    target = wide.mapping[node]

    target.target = _target(node, args)
    target.args = tuple(pytree.tree_map(lambda x: _literal(wide, target, x), list(args)))


def resized_fill(
    wide: ResizedGraph, node: fx.Node, operand: fx.Node, dim: int, size: int
) -> fx.Node | None:
    """Write an operand that holds one value everywhere in another `size`, before its reader.

    None where the operand is no such one, or where its sizes are no literals.
    """
    if find(operand.target) is not creation.filled:
        return None
    names = argument_names(operand.target)
    if "size" not in names:
        return None
    place = names.index("size")
    sizes = list(cast("Sequence[Any]", operand.args[place]))
    sizes[dim] = _grown(wide, sizes[dim], wide.values[operand].shape[dim], size)
    if sizes[dim] is None:
        return None
    with wide.graph.inserting_before(wide.mapping[node]):
        again = wide.graph.node_copy(wide.mapping[operand], lambda n: n)
        again.update_arg(place, [_literal(wide, again, x) for x in sizes])
    return again


def _literal(wide: ResizedGraph, target: fx.Node, x: Any) -> Any:
    """Return an argument for a node of the concatenated graph, before which sizes are computed."""
    if isinstance(x, _Scaled):
        with wide.graph.inserting_before(target):
            own = wide.mapping[x.size]
            size = wide.graph.call_function(operator.mul, (own, x.ratio.numerator))
            if x.ratio.denominator == 1:
                return size
            return wide.graph.call_function(operator.floordiv, (size, x.ratio.denominator))
    return wide.mapping[x] if isinstance(x, fx.Node) else x


def _target(node: fx.Node, args: Sequence[Any]) -> Any:
    """Return the operator for some arguments: equal parts may become parts of given sizes."""
    parts = node.target in (aten.split.Tensor, aten.chunk.default) and isinstance(args[1], list)
    return aten.split_with_sizes.default if parts else node.target


def evaluate(wide: ResizedGraph, node: fx.Node, args: Any, tensor: torch.Tensor) -> Any:
    """Run a node's operator on a tensor in place of its first argument.

    `args` are the node's own, or one of its `candidates`.
    """

    def concrete(x: Any) -> Any:
        if isinstance(x, _Scaled):
            return int(concrete(x.size) * x.ratio)
        return _number(wide, x) if isinstance(x, fx.Node) else x

    rest = pytree.tree_map(concrete, tuple(args[1:]))
    kwargs = pytree.tree_map(concrete, dict(node.kwargs))
    is_view = find(node.target) is movement.view
    target = aten.reshape.default if is_view else _target(node, args)
    return target(tensor, *rest, **kwargs)


def _number(wide: ResizedGraph, node: fx.Node) -> Any:
    """What a node that an operator takes in place of a literal is on the example inputs."""
    value = wide.values[node]
    return value.constant if isinstance(value, AbstractTensor) else hint(value)


def candidates(
    wide: ResizedGraph, node: fx.Node, value: AbstractTensor, layouts: Layouts
) -> Iterator[tuple[Any, ...]]:
    """Yield arguments that a data movement could have in the concatenated network."""
    args = node.args
    is_view = find(node.target) is movement.view or node.target is aten.expand.default
    if is_view or node.target is aten.unflatten.int:
        place = 1 if is_view else 2
        sizes = list(args[place])  # type: ignore[arg-type]
        # Unflattening writes the sizes of one dimension only.
        written = range(value.rank) if is_view else [dimension(node, value.rank)]
        growth = [(value.shape[dim], lay.size) for dim, lay in layouts.items() if dim in written]
        for dims in combinations(range(len(sizes)), len(growth)):
            grown = list(sizes)
            for d, (old, new) in zip(dims, growth, strict=True):
                grown[d] = _grown(wide, grown[d], old, new)
            if None not in grown:
                yield (*args[:place], grown, *args[place + 1 :])
        return
    dim = dimension(node, value.rank)
    if node.target in (aten.slice.Tensor, aten.narrow.default) and dim in layouts:
        yield from _slices(wide, node, layouts[dim], value.shape[dim])
        return
    if node.target in (aten.split_with_sizes.default,) and dim in layouts:
        ends = np.cumsum([0, *cast("Sequence[int]", args[1])])
        yield (args[0], _sizes(layouts[dim], ends), *args[2:])
        return
    if node.target in (aten.split.Tensor, aten.chunk.default) and dim in layouts:
        parts = cast("Sequence[AbstractTensor]", wide.values[node])
        ends = np.cumsum([0, *(part.shape[dim] for part in parts)])
        sizes = _sizes(layouts[dim], ends)
        if node.target is aten.split.Tensor and {*sizes[:-1], max(sizes)} == {max(sizes)}:
            yield (args[0], max(sizes), *args[2:])
        else:
            # Parts of the new width need not be equal.
            yield (args[0], sizes, dim)
        return
    yield tuple(args)


def _sizes(layout: Layout, ends: Index) -> list[int]:
    """Return how many copies there are of the indices between each two successive ends."""
    ordered = np.sort(layout.source)
    sizes: list[int] = np.diff(np.searchsorted(ordered, ends)).tolist()
    return sizes


def _slices(
    wide: ResizedGraph, node: fx.Node, layout: Layout, size: int
) -> Iterator[tuple[Any, ...]]:
    """Yield the wide range that holds exactly the copies of a narrow range (steps of 1)."""
    kept = evaluate(wide, node, (None, 0, *node.args[2:]), torch.arange(size)).numpy()
    inside = np.flatnonzero(np.isin(layout.source, kept))
    if not len(inside):
        raise cannot_write(node, "no unit is left of what it takes")
    start, end = int(inside.min()), int(inside.max()) + 1
    last = end if node.target is aten.slice.Tensor else end - start
    if len(inside) == end - start:
        yield (node.args[0], node.args[1], start, last)


def _grown(wide: ResizedGraph, size: Any, old: int, new: int) -> Any:
    """A size in which a dimension grew from `old` to `new`; None where that is no whole number."""
    if isinstance(size, fx.Node):
        ratio = Fraction(new, old)
        # What is rounded could be the size as it is: a batch of 2 is no batch of 2.5.
        return _Scaled(size, ratio) if (_number(wide, size) * ratio).denominator == 1 else None
    if size <= 0:
        return size
    return None if size * new % old else size * new // old
