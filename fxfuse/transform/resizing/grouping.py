"""Channels that have to stand together: groups, halves of a gate, pixels of a patch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from torch import fx

from fxfuse.analysis.labels import AbstractTensor
from fxfuse.analysis.rules import find, reduction
from fxfuse.graph.arguments import argument, set_argument
from fxfuse.graph.operator_facts import FACTS, Convolution, Normalisation
from fxfuse.graph.torch_compat import hint
from fxfuse.transform.layout import Layout
from fxfuse.transform.resizing.operands import agree, require
from fxfuse.transform.resizing.propagate import complete, propagate_layouts
from fxfuse.transform.resizing.state import Layouts, ResizedGraph, cannot_write


def resize_groups(wide: ResizedGraph, node: fx.Node) -> Any:
    """Convolution and group normalisation: channels of a group have to stand together."""
    facts = FACTS[node.target]
    assert isinstance(facts, Convolution | Normalisation)
    given = argument(node, facts.groups)
    # One group for each example, say: as many as the example has.
    groups = int(hint(given.meta["val"]) if isinstance(given, fx.Node) else given)
    if groups == 1:
        return propagate_layouts(wide, node)
    x: fx.Node = argument(node, facts.input)
    value, result = wide.values[x], wide.values[node]
    weight = argument(node, facts.weight) if isinstance(facts, Convolution) else None
    transposed = isinstance(facts, Convolution) and facts.transposed
    dim = facts.channels % value.rank
    layout = wide.layouts[x].get(dim)
    copies = _copies_of_groups(wide, groups, value, dim, layout)
    if isinstance(given, fx.Node) or (weight is not None and 1 in wide.layout_of(weight)):
        # Neurons that have no index of the groups: a group takes in those of all members.
        copies = None
    if copies is None:
        # The groups stay as many; what grows is the number of channels in each of them.
        wanted = None if layout is None else layout.by_index()
        grows = wide.units.order(result, dim) is not None
        rows = np.arange(result.shape[dim])
        out = wide.units.index_layout(result, dim, rows) if grows else None
        for there, size in ((wanted, value.shape[dim]), (out, result.shape[dim])):
            if there is not None and not _is_even(there, size, groups):
                raise cannot_write(node, "its groups of channels would differ in size")
        inner = None if wanted is None else wanted.head(value.shape[dim] // groups)
        if transposed:
            inner = None if out is None else out.head(result.shape[dim] // groups)
    else:
        wanted = _by_group(copies, value.shape[dim] // groups)
        out, inner = _by_group(copies, result.shape[dim] // groups), None
        set_argument(wide.mapping[node], facts.groups, sum(map(len, copies)))
    if layout is not None and wanted is not None:
        agree(wide, node, x, dim, layout, wanted)
    first = wanted if transposed else out
    shapes = {facts.weight: (first,) if weight is None else (first, inner), facts.bias: (out,)}
    for name, layouts in shapes.items():
        operand = argument(node, name)
        if isinstance(operand, fx.Node):
            for d, needed in enumerate(layouts):
                require(wide, node, operand, d, needed)
    return complete(wide, node, result, {} if out is None else {dim: out})


def _copies_of_groups(
    wide: ResizedGraph, groups: int, value: AbstractTensor, dim: int, layout: Layout | None
) -> list[list[int]] | None:
    """Return which members' copies each group has; None if it is not groups that are copied."""
    line = wide.units.along(value, dim)
    if layout is None or line is None:
        return None
    units = line.reshape(groups, -1)
    if not bool((units == units[:, :1]).all()):
        return None
    of = layout.source // units.shape[1]
    return [np.unique(layout.copy[of == g]).tolist() for g in range(groups)]


def resize_gated(wide: ResizedGraph, node: fx.Node) -> Layouts:
    """Gated linear units: the first half of the layout has to be the order of both halves."""
    x = cast("fx.Node", node.args[0])
    value: AbstractTensor = wide.values[x]
    dim = int(argument(node, "dim")) % value.rank
    result = dict(wide.layouts[x])
    layout = result.get(dim)
    if layout is not None:
        half = value.shape[dim] // 2
        result[dim] = layout.head(half)
        both = Layout(
            np.concatenate([result[dim].source, result[dim].source + half]),
            np.tile(result[dim].copy, 2),
        )
        agree(wide, node, x, dim, layout, both)
    return result


def resize_patches(wide: ResizedGraph, node: fx.Node) -> Layouts:
    """Resize patches: the pixels of a channel stand together in a column."""
    inverse = find(node.target) is reduction.unfold
    x = cast("fx.Node", node.args[0])
    before, after = wide.values[x], wide.values[node]
    column, channel = (
        (after.rank - 2, before.rank - 3) if inverse else (before.rank - 2, after.rank - 3)
    )
    size = (
        after.shape[column] // before.shape[channel]
        if inverse
        else before.shape[column] // after.shape[channel]
    )
    result = {d: layout for d, layout in wide.layouts[x].items() if d < min(column, channel)}
    layout = wide.layouts[x].get(channel if inverse else column)
    if layout is not None and inverse:
        result[column] = layout.repeated(size)
    elif layout is not None:
        wanted = layout.by_block(size)
        agree(wide, node, x, column, layout, wanted)
        result[channel] = Layout(wanted.source[::size] // size, wanted.copy[::size])
    return complete(wide, node, after, result)


def _by_group(copies: Sequence[Sequence[int]], size: int) -> Layout:
    """Return groups of `size` channels, the copies of a group next to each other."""
    pairs = [(g, copy) for g, members in enumerate(copies) for copy in members]
    source = [np.arange(g * size, (g + 1) * size) for g, _ in pairs]
    return Layout(np.concatenate(source), np.repeat([copy for _, copy in pairs], size))


def _is_even(layout: Layout, size: int, groups: int) -> bool:
    """Tell whether every group of successive indices has as many copies as the first one."""
    counts = np.bincount(layout.source * groups // size, minlength=groups)
    return bool((counts == counts[0]).all())
