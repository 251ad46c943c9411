"""Writes a data movement that no literals describe as a gather from the flat operand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fxfuse.analysis.labels import AbstractTensor, DimLabels
from fxfuse.analysis.rules import find, movement
from fxfuse.errors import RewriteError
from fxfuse.transform.layout import Layout
from fxfuse.transform.resizing.gather_index import Move, Movement
from fxfuse.transform.resizing.literals import evaluate
from fxfuse.transform.resizing.state import Layouts, ResizedGraph, as_list, cannot_write

aten = torch.ops.aten
#: Operators whose result is the operand itself; casts are none of them.
_IDENTITIES = (aten.contiguous.default, aten.clone.default, aten.alias.default, aten.detach.default)


def gather(wide: ResizedGraph, node: fx.Node, operand: fx.Node, have: Layouts) -> Any:
    """Write a gather in place of a data movement, and return the layouts of its result or results.

    A result that is no tensor of whole copies (half way through a channel shuffle, say) is left to
    the movements that read it: they are written together with this one.
    """
    results, operator_node = wide.values[node], wide.mapping[node]
    source, earlier, passed = wide.pending.get(operand, (operand, lambda tensor: tensor, ()))
    if passed:
        have = wide.layout_of(source)
    layouts: list[Layouts] = []
    for place, part in enumerate(as_list(results)):
        old = node
        if isinstance(results, list):
            users = [user for user in node.users if user.args[1] == place]
            if not users:
                layouts.append({})
                continue
            old = users[0]

        def move(tensor: torch.Tensor, place: int = place) -> torch.Tensor:
            found: torch.Tensor = as_list(evaluate(wide, node, node.args, earlier(tensor)))[place]
            return found

        try:
            moved = _movement(wide, node, wide.values[source], part, move, have)
            written = _write(wide, node, source, old, moved)
        except RewriteError:
            # Members that can be run one by one need nothing half-written.
            if wide.apart or old is not node or not all(_moves(user) for user in node.users):
                raise
            wide.pending[node] = (source, move, (*passed, node))
            return {}
        replaced = wide.replace(old, written)
        if old is not node:
            wide.graph.erase_node(replaced)
        layouts.append(dict(moved.want))
    wide.graph.erase_node(operator_node)
    for skipped in reversed(passed):
        if not wide.mapping[skipped].users:
            wide.graph.erase_node(wide.mapping[skipped])
    return layouts if isinstance(results, list) else layouts[0]


def _moves(node: fx.Node) -> bool:
    """Whether a node moves data and does nothing else, so that it can be written with others."""
    if node.target in _IDENTITIES:
        return True
    return node.op == "call_function" and find(node.target) in (movement.move, movement.view)


def _movement(
    wide: ResizedGraph,
    node: fx.Node,
    value: AbstractTensor,
    part: AbstractTensor,
    move: Move,
    have: Layouts,
) -> Movement:
    """Return the movement of an operand to one result, whose layouts are new."""
    units = wide.units
    fields = {d: f for f in part.fields if (d := units.growing(f)) is not None}
    want: dict[int, Layout] = {}
    for dim, f in fields.items():
        layout = units.run_layout(f, dim)
        if layout is None:
            raise cannot_write(node, "units of one index would have different numbers of copies")
        want[dim] = layout
    twin = {}
    for dim in have:
        f = next(f for f in value.fields if dim in f.dims and units.growing(f) is not None)
        moved = units.free_units(DimLabels(move(f.ids.expand(value.shape)), ()))
        for d, g in fields.items():
            # Where nothing is free, nothing has copies.
            if bool(((units.free_units(g) == moved) | (moved < 0)).all()):
                twin[dim] = d
    return Movement(move, value.shape, have, want, twin)


def _write(
    wide: ResizedGraph, node: fx.Node, source: fx.Node, result: fx.Node, movement: Movement
) -> fx.Node:
    """Write a movement as `index_select` of the flat operand, sample by sample."""
    before, after = (_symbolic(n.meta["val"]) for n in (source, result))
    one = len(before) == len(after) == 1
    if (before or after) and not (one and movement.kept(before[0], after[0])):
        raise cannot_write(node, "it moves neurons between samples")
    index, size = movement.index(before[0] if before else None)
    if before:
        index = index.select(after[0], 0)
    if bool((index < 0).any()):
        raise cannot_write(node, "a copy of a neuron is missing")
    shape, lead = list(index.shape), [-1] if before else []
    with wide.graph.inserting_before(wide.mapping[result]):
        call, x = wide.graph.call_function, wide.mapping[source]
        if before:
            x = call(aten.movedim.int, (x, before[0], 0))
        x = call(aten.reshape.default, (x, [*lead, size]))
        x = call(aten.index_select.default, (x, len(lead), wide.hold(index.reshape(-1))))
        if index.numel():
            x = call(aten.reshape.default, (x, [*lead, *shape]))
        else:
            # Of an empty tensor no size can be left open.
            x = call(aten.unflatten.int, (x, len(lead), shape))
        return call(aten.movedim.int, (x, 0, after[0])) if before else x


def _symbolic(value: Any) -> list[int]:
    """Return the dimensions whose size is not known before the network runs."""
    sizes: Sequence[Any] = value.shape
    return [d for d, size in enumerate(sizes) if not isinstance(size, int)]
