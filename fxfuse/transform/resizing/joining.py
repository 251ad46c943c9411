"""Joins tensors along a dimension: concatenation, stacking, replacing a part, padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from torch import fx

from fxfuse.analysis.labels import AbstractTensor
from fxfuse.analysis.rules import find, movement
from fxfuse.graph.arguments import argument, set_argument
from fxfuse.transform.layout import Layout
from fxfuse.transform.resizing.literals import dimension
from fxfuse.transform.resizing.operands import agree, spread
from fxfuse.transform.resizing.state import Layouts, ResizedGraph, cannot_write

aten = torch.ops.aten


def join(wide: ResizedGraph, node: fx.Node) -> Layouts:
    """Resize concatenation and stacking: layouts along the joined dimension follow each other."""
    tensors = cast("Sequence[fx.Node]", node.args[0])
    parts = [n for n in tensors if wide.values[n].shape != (0,)]
    dim = dimension(node, wide.values[node].rank)
    return _joined(wide, node, parts, dim, stacks=find(node.target) is movement.stack)


def _joined(
    wide: ResizedGraph, node: fx.Node, parts: Sequence[fx.Node], dim: int, *, stacks: bool
) -> Layouts:
    """Return the layouts of parts that follow each other along a dimension."""
    result: Layouts = {}
    lines, copies, offset, grows = [], [], 0, False
    for part in parts:
        layouts = wide.layout_of(part)
        size = 1 if stacks else wide.values[part].shape[dim]
        layout = None if stacks else layouts.get(dim)
        labelled = any(dim in f.dims for f in wide.values[part].fields)
        if layout is None and not labelled and find(node.target) is movement.cat:
            layout = _state_layout(wide, node, part, dim, offset)
        grows |= layout is not None
        lines.append(offset + (layout.source if layout else np.arange(size)))
        copies.append(layout.copy if layout else np.full(size, -1))
        offset += size
        for d, other in layouts.items():
            shifted = d + 1 if stacks and d >= dim else d
            if shifted != dim:
                agree(wide, node, part, d, other, result.setdefault(shifted, other))
    for part in parts:
        known = wide.layout_of(part)
        for d, layout in result.items():
            own = d - 1 if stacks and d > dim else d
            if own not in known:
                spread(wide, node, part, own, layout)
    if grows:
        result[dim] = Layout(np.concatenate(lines), np.concatenate(copies))
    return result


def _state_layout(
    wide: ResizedGraph, node: fx.Node, part: fx.Node, dim: int, offset: int
) -> Layout | None:
    """Give a state that begins as a constant as many neurons as there are copies of them."""
    size = wide.values[part].shape[dim]
    found = wide.units.index_layout(wide.values[node], dim, np.arange(offset, offset + size))
    if bool((found.copy < 0).all()):
        return None
    own = Layout(found.source - offset, found.copy)
    spread(wide, node, part, dim, own, broadcasts=False)
    return own


def overwrite(wide: ResizedGraph, node: fx.Node) -> Layouts:
    """A part is replaced: what is left of the whole, and the part, in the order of both."""
    whole, part = cast("tuple[fx.Node, fx.Node]", node.args[:2])
    value: AbstractTensor = wide.values[node]
    dim = dimension(node, value.rank)
    result = _joined(wide, node, [whole, part], dim, stacks=False)
    have = result.pop(dim, None)
    if have is None:
        return result
    size = value.shape[dim]
    places = torch.arange(size + wide.values[part].shape[dim])
    ends = [argument(node, name) for name in ("start", "end", "step")]
    origin = aten.slice_scatter.default(places[:size], places[size:], 0, *ends)
    rows = [np.flatnonzero(have.source == place) for place in origin.tolist()]
    order = np.concatenate(rows)
    pieces = [wide.current(node, n) for n in (whole, part)]
    with wide.graph.inserting_before(wide.mapping[node]):
        both = wide.graph.call_function(aten.cat.default, (pieces, dim))
        places_node = wide.hold(torch.from_numpy(order))
        written = wide.graph.call_function(aten.index_select.default, (both, dim, places_node))
    wide.graph.erase_node(wide.replace(node, written))
    result[dim] = Layout(np.repeat(np.arange(size), [len(r) for r in rows]), have.copy[order])
    return result


def pad(wide: ResizedGraph, node: fx.Node) -> Layouts:
    """Resize padding: a padded place that grows is padded once for each member."""
    source = cast("fx.Node", node.args[0])
    value: AbstractTensor = wide.values[node]
    layouts = wide.layout_of(source)
    amounts = list(argument(node, "pad"))
    result: Layouts = {}
    for dim in range(value.rank):
        if wide.units.order(value, dim) is None:
            continue
        at = 2 * (value.rank - 1 - dim)
        before, after = amounts[at : at + 2] or (0, 0)
        if not (before or after):
            if dim in layouts:
                result[dim] = layouts[dim]
            continue
        if min(before, after) < 0:
            raise cannot_write(node, "negative padding cuts neurons off")
        size = wide.values[source].shape[dim]
        inner = layouts.get(dim, Layout(np.arange(size), np.full(size, -1)))
        end = before + size
        first = wide.units.index_layout(value, dim, np.arange(before))
        last = wide.units.index_layout(value, dim, np.arange(end, end + after))
        result[dim] = Layout(
            np.concatenate([first.source, before + inner.source, last.source]),
            np.concatenate([first.copy, inner.copy, last.copy]),
        )
        amounts[at : at + 2] = [first.size, last.size]
    if result:
        set_argument(wide.mapping[node], "pad", amounts)
    return result
