"""Brings operands into the order of neurons that a node needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from torch import fx

from fxfuse.analysis.labels import AbstractTensor, Index
from fxfuse.transform.layout import Layout
from fxfuse.transform.resizing.literals import resized_fill
from fxfuse.transform.resizing.state import Layouts, ResizedGraph, cannot_write

aten = torch.ops.aten


def agree(
    wide: ResizedGraph, node: fx.Node, operand: fx.Node, dim: int, layout: Layout, wanted: Layout
) -> None:
    """Bring one dimension of an operand into the order that a node needs."""
    if same(layout, wanted):
        return
    have = {pair: i for i, pair in enumerate(_pairs(layout))}
    if operand.op != "get_attr":
        have = _with_shared(wide, operand, dim, layout) | have
    elsewhere = set(_pairs(layout)) - set(_pairs(wanted))
    lost = any((source, -1) not in have for source, _ in elsewhere)
    if lost or not have.keys() >= set(_pairs(wanted)):
        raise cannot_write(node, "two operands carry different copies of the same neurons")
    _pick(wide, node, operand, dim, [have[pair] for pair in _pairs(wanted)])


def _with_shared(
    wide: ResizedGraph, operand: fx.Node, dim: int, layout: Layout
) -> dict[tuple[int, int], int]:
    """Where an activation's neurons stand that do not grow: any copy of them is the others."""
    units = wide.units.along(wide.values[operand], dim)
    # What has a layout has labels.
    assert units is not None
    grows = wide.units.grow(units)
    copies = (-1, *range(int(wide.units.count.max())))
    return {
        (source, copy): place
        for place, source in reversed(list(enumerate(layout.source.tolist())))
        if not grows[source]
        for copy in copies
    }


def spread(
    wide: ResizedGraph,
    node: fx.Node,
    operand: fx.Node,
    dim: int,
    wanted: Layout,
    *,
    broadcasts: bool = True,
) -> None:
    """An operand gets the layout that a node needs; one without neurons there is repeated.

    Where the node broadcasts, a dimension of size 1 may stay as it is.
    """
    have = wide.layout_of(operand).get(dim)
    size = wide.values[operand].shape[dim]
    if have is not None:
        agree(wide, node, operand, dim, have, wanted)
    elif size > 1 or not broadcasts:
        fill = resized_fill(wide, node, operand, dim, wanted.size)
        if fill is not None:
            wide.reroute(node, operand, fill)
        else:
            _pick(wide, node, operand, dim, wanted.source.tolist())


def require(
    wide: ResizedGraph, node: fx.Node, operand: fx.Node, dim: int, wanted: Layout | None
) -> None:
    """An operand has to have a layout along a dimension; a parameter without one gets it."""
    if operand.op == "get_attr" and wanted is not None:
        place = dict(wide.parameter_places(operand)).get(dim)
        if place is not None and place in wide.resized:
            wide.places.setdefault(place, wanted)
    have = wide.layout_of(operand).get(dim)
    size = wide.values[operand].shape[dim]
    if have is not None and wanted is not None:
        agree(wide, node, operand, dim, have, wanted)
    elif wanted is not None and dim == 0 and not _is_labelled(wide, operand, dim):
        # A filter without channels of its own is each copy's.
        spread(wide, node, operand, dim, wanted)
    elif have is not None or (wanted is not None and wanted.size != size):
        raise cannot_write(node, "a parameter does not grow with the groups of its channels")


def _is_labelled(wide: ResizedGraph, operand: fx.Node, dim: int) -> bool:
    return any(dim in f.dims for f in wide.values[operand].fields)


def broadcast(
    wide: ResizedGraph, node: fx.Node, operands: Sequence[fx.Node], result: Layouts
) -> None:
    """An operand that is the same for all neurons of a dimension keeps one of them there."""
    value: AbstractTensor = wide.values[node]
    for operand in operands:
        own: AbstractTensor = wide.values[operand]
        layouts = wide.layout_of(operand)
        for dim, layout in result.items():
            place = dim - value.rank + own.rank
            size = value.shape[dim]
            if place < 0 or place in layouts or layout.size == size:
                continue
            if own.shape[place] == size and place not in own.unlabelled:
                with wide.graph.inserting_before(wide.mapping[node]):
                    args = (wide.current(node, operand), place, 0, 1)
                    one = wide.graph.call_function(aten.slice.Tensor, args)
                wide.reroute(node, operand, one)


def reorder(wide: ResizedGraph, node: fx.Node, layouts: Layouts, ordered: Layouts) -> None:
    """Bring the first operand of a node from its layouts into others of the same copies."""
    operand = cast("fx.Node", wide.mapping[node].args[0])
    for dim, wanted in ordered.items():
        have = {pair: i for i, pair in enumerate(_pairs(layouts[dim]))}
        operand = select(wide, node, operand, dim, [have[pair] for pair in _pairs(wanted)])
    wide.mapping[node].update_arg(0, operand)


def same(a: Layout, b: Layout) -> bool:
    """Tell whether two layouts hold the same copies in the same order."""
    return np.array_equal(a.source, b.source) and np.array_equal(a.copy, b.copy)


def _pick(
    wide: ResizedGraph, node: fx.Node, operand: fx.Node, dim: int, places: Sequence[int]
) -> None:
    """Put an `index_select` between an operand and a node."""
    if operand.op != "get_attr" and not isinstance(operand.meta["val"].shape[dim], int):
        raise cannot_write(node, "neurons are in another order in every sample")
    current = wide.current(node, operand)
    wide.reroute(node, operand, select(wide, node, current, dim, places))


def select(
    wide: ResizedGraph, node: fx.Node, tensor: fx.Node, dim: int, places: Sequence[int] | Index
) -> fx.Node:
    """Write an `index_select` before a node; return it."""
    with wide.graph.inserting_before(wide.mapping[node]):
        order = wide.hold(torch.tensor(places))
        return wide.graph.call_function(aten.index_select.default, (tensor, dim, order))


def _pairs(layout: Layout) -> list[tuple[int, int]]:
    return list(zip(layout.source.tolist(), layout.copy.tolist(), strict=True))
