"""Writes operators once for each member, and puts the members' values together again."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import fx

from fxfuse.analysis.labels import AbstractTensor, Index
from fxfuse.transform.layout import Layout
from fxfuse.transform.resizing.operands import select
from fxfuse.transform.resizing.state import Layouts, ResizedGraph, cannot_write, has_tensor

aten = torch.ops.aten


def run_apart(wide: ResizedGraph, node: fx.Node) -> Any:
    """Write a node once for each member; layouts of the results, put together where that works."""
    assert wide.apart is not None
    operator_node = wide.mapping[node]
    with wide.graph.inserting_before(operator_node):
        parts = [_of_member(wide, node, i) for i in range(wide.apart.n_members)]
        wide.split[node] = parts
        value = wide.values[node]
        found = wide.apart.layout_of(node) if isinstance(value, AbstractTensor) else None
        if found is None:
            written, layouts = parts[0], Layouts()
        else:
            written, layouts = _together(wide, node, parts, *found), {found[0]: found[1]}
    wide.graph.erase_node(wide.replace(node, written))
    return layouts


def write_outputs(wide: ResizedGraph) -> None:
    """Hand out the members' mean where an output is computed once for each member."""
    before = next(n for n in wide.analysis.program.graph.nodes if n.op == "output")
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


def _mean(wide: ResizedGraph, node: fx.Node) -> fx.Node:
    dtype = node.meta["val"].dtype
    if not (dtype.is_floating_point or dtype.is_complex):
        raise cannot_write(node, f"an output of {dtype} has no mean over the members")
    together = wide.graph.call_function(aten.stack.default, (wide.split[node],))
    return wide.graph.call_function(aten.mean.dim, (together, [0]))


def _of_member(wide: ResizedGraph, node: fx.Node, member: int) -> fx.Node:
    """Return a node as it is in a member, with the sizes that its literals have there."""
    assert wide.apart is not None
    counterparts = wide.apart.counterparts

    def operand(own: fx.Node) -> fx.Node:
        return _own(wide, node, counterparts.original_of(own, member), member)

    return wide.graph.node_copy(wide.analysis.node_of(node, member), operand)


def _own(wide: ResizedGraph, node: fx.Node, operand: fx.Node, member: int) -> fx.Node:
    """Return a member's own value of an operand."""
    assert wide.apart is not None
    if wide.apart.owns(operand):
        return wide.own_tensor(operand, member)
    if operand in wide.split:
        return wide.split[operand][member]
    if not has_tensor(wide.values[operand]):
        return _number(wide, operand, member)
    found = wide.mapping[operand]
    if operand not in wide.layouts or not isinstance(wide.values[operand], AbstractTensor):
        return found
    layouts = wide.layout_of(operand)
    size = wide.values[operand].shape
    for dim, own in enumerate(wide.apart.counterparts.value_of(operand, member).shape):
        if dim in layouts:
            places = wide.apart.counterparts.places(operand, dim, layouts[dim], member)
            if places is None:
                raise cannot_write(node, "an operand lacks a member's own units")
            found = _taken(wide, node, found, dim, places)
        elif own != size[dim]:
            why = f"dimension {dim} of {operand.name} differs between members, not in its units"
            raise cannot_write(node, why)
    return found


def _number(wide: ResizedGraph, operand: fx.Node, member: int) -> fx.Node:
    """Return a size as it is computed in a member; the one that all share where it is the same."""
    assert wide.apart is not None
    own = wide.analysis.node_of(operand, member)
    if any(has_tensor(wide.values[n]) for n in operand.all_input_nodes):
        # The size of a batch, or of another dimension that no member has of its own.
        return wide.mapping[operand]
    numbers = {n: _number(wide, n, member) for n in operand.all_input_nodes}
    literals = [fx.map_arg((n.args, n.kwargs), lambda _: None) for n in (operand, own)]
    if literals[0] == literals[1] and all(numbers[n] is wide.mapping[n] for n in numbers):
        return wide.mapping[operand]
    counterparts = wide.apart.counterparts
    return wide.graph.node_copy(own, lambda n: numbers[counterparts.original_of(n, member)])


def _taken(wide: ResizedGraph, node: fx.Node, tensor: fx.Node, dim: int, places: Index) -> fx.Node:
    """Return some places along a dimension; a view where they stand at equal distances."""
    steps = np.unique(np.diff(places))
    if len(steps) == 1 and steps[0] > 0:
        end = int(places[-1]) + 1
        args = (tensor, dim, int(places[0]), end, int(steps[0]))
        return wide.graph.call_function(aten.slice.Tensor, args)
    return select(wide, node, tensor, dim, places)


def _together(
    wide: ResizedGraph, node: fx.Node, parts: list[fx.Node], dim: int, layout: Layout
) -> fx.Node:
    """Return the members' values along one dimension, in the order of a layout."""
    assert wide.apart is not None
    order = np.full(layout.size, -1)
    sizes: list[int] = []
    for member in range(len(parts)):
        places = wide.apart.counterparts.places(node, dim, layout, member)
        # Otherwise the members' values are not put together.
        assert places is not None
        order[places] = sum(sizes) + np.arange(len(places))
        sizes.append(len(places))
    call = wide.graph.call_function
    side_by_side = np.arange(len(order)).reshape(len(parts), -1) if len(set(sizes)) == 1 else None
    if side_by_side is not None and np.array_equal(order, side_by_side.T.reshape(-1)):
        return call(
            aten.flatten.using_ints, (call(aten.stack.default, (parts, dim + 1)), dim, dim + 1)
        )
    joined = call(aten.cat.default, (parts, dim))
    if np.array_equal(order, np.arange(len(order))):
        return joined
    return select(wide, node, joined, dim, order)
