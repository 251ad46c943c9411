"""Writes operators once for each member, and puts the members' values together again."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import fx

from fxfuse.labels import Index, Value
from fxfuse.layout import Layout
from fxfuse.widen.operands import select
from fxfuse.widen.state import Layouts, WideGraph, cannot_write

aten = torch.ops.aten


def run_apart(wide: WideGraph, node: fx.Node) -> Any:
    """Writes a node once for each member; layouts of the results, put together where that works.

    Raises:
        RewriteError: A member's own value of an operand is not there.
    """
    assert wide.apart is not None
    operator_node = wide.mapping[node]
    members = range(wide.apart.n_members)
    with wide.graph.inserting_before(operator_node):
        parts = [
            wide.graph.node_copy(node, lambda n, i=i: _own(wide, node, n, i))  # type: ignore[misc]
            for i in members
        ]
        wide.split[node] = parts
        value = wide.values[node]
        found = wide.apart.layout_of(value) if isinstance(value, Value) else None
        if found is None:
            written, layouts = parts[0], Layouts()
        else:
            written, layouts = _together(wide, node, parts, *found), {found[0]: found[1]}
    wide.graph.erase_node(wide.replace(node, written))
    return layouts


def write_outputs(wide: WideGraph) -> None:
    """Hands out the members' mean where an output is computed once for each member.

    Raises:
        RewriteError: An output is no number, so that there is no mean of it.
    """
    before = next(n for n in wide.analysis.captured.graph.nodes if n.op == "output")
    after = next(n for n in wide.graph.nodes if n.op == "output")
    means: dict[fx.Node, fx.Node] = {}

    def handed_out(node: fx.Node) -> fx.Node:
        if node not in wide.split or wide.layouts[node]:
            return wide.mapping[node]
        if node not in means:
            means[node] = _mean(wide, node)
        return means[node]

    with wide.graph.inserting_before(after):
        after.args = fx.map_arg(before.args, handed_out)


def _mean(wide: WideGraph, node: fx.Node) -> fx.Node:
    dtype = node.meta["val"].dtype
    if not (dtype.is_floating_point or dtype.is_complex):
        raise cannot_write(node, f"an output of {dtype} has no mean over the members")
    together = wide.graph.call_function(aten.stack.default, (wide.split[node],))
    return wide.graph.call_function(aten.mean.dim, (together, [0]))


def _own(wide: WideGraph, node: fx.Node, operand: fx.Node, member: int) -> fx.Node:
    """A member's own value of an operand."""
    assert wide.apart is not None
    if wide.apart.owns(operand):
        return wide.own_tensor(operand, member)
    if operand in wide.split:
        return wide.split[operand][member]
    found = wide.mapping[operand]
    for dim, layout in wide.layout_of(operand).items() if operand in wide.layouts else ():
        places = np.flatnonzero((layout.copy == member) | (layout.copy < 0))
        places = places[np.argsort(layout.source[places], kind="stable")]
        size = wide.values[operand].shape[dim]
        if not np.array_equal(layout.source[places], np.arange(size)):
            raise cannot_write(node, "an operand lacks a member's own units")
        found = _taken(wide, node, found, dim, places)
    return found


def _taken(wide: WideGraph, node: fx.Node, tensor: fx.Node, dim: int, places: Index) -> fx.Node:
    """Some places along a dimension; a view where they stand at equal distances."""
    steps = np.unique(np.diff(places))
    if len(steps) == 1 and steps[0] > 0:
        end = int(places[-1]) + 1
        args = (tensor, dim, int(places[0]), end, int(steps[0]))
        return wide.graph.call_function(aten.slice.Tensor, args)
    return select(wide, node, tensor, dim, places)


def _together(
    wide: WideGraph, node: fx.Node, parts: list[fx.Node], dim: int, layout: Layout
) -> fx.Node:
    """The members' values along one dimension, in the order of a layout."""
    size = len(layout.source) // len(parts)
    order = layout.copy * size + layout.source
    call = wide.graph.call_function
    if np.array_equal(order, np.arange(len(parts) * size).reshape(len(parts), size).T.reshape(-1)):
        return call(
            aten.flatten.using_ints, (call(aten.stack.default, (parts, dim + 1)), dim, dim + 1)
        )
    joined = call(aten.cat.default, (parts, dim))
    if np.array_equal(order, np.arange(len(order))):
        return joined
    return select(wide, node, joined, dim, order)
