"""Writes a data movement that no literals describe as a gather from the flat operand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fxfuse.labels import Field, Value
from fxfuse.layout import Layout
from fxfuse.widen.gather_index import Move, Movement
from fxfuse.widen.literals import evaluate
from fxfuse.widen.state import Layouts, WideGraph, as_list, cannot_write

aten = torch.ops.aten


def gather(wide: WideGraph, node: fx.Node, source: fx.Node, have: Layouts) -> Any:
    """Writes a gather in place of a data movement.

    Args:
        wide: The concatenated graph.
        node: The data movement, a node of the members' graph.
        source: Its operand.
        have: Layouts of the operand's dimensions that grow.

    Returns:
        Layouts of the result; a list of them where the movement returns a list.

    Raises:
        RewriteError: It moves neurons between samples, or the operand lacks a copy.
    """
    results, operator_node = wide.values[node], wide.mapping[node]
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
            found: torch.Tensor = as_list(evaluate(wide, node, node.args, tensor))[place]
            return found

        movement = _movement(wide, wide.values[source], part, move, have)
        replaced = wide.replace(old, _write(wide, node, source, old, movement))
        if old is not node:
            wide.graph.erase_node(replaced)
        layouts.append(dict(movement.want))
    wide.graph.erase_node(operator_node)
    return layouts if isinstance(results, list) else layouts[0]


def _movement(wide: WideGraph, value: Value, part: Value, move: Move, have: Layouts) -> Movement:
    """The movement of an operand to one result, whose layouts are new."""
    units = wide.units
    fields = {d: f for f in part.fields if (d := units.growing(f)) is not None}
    want: dict[int, Layout] = {dim: units.run_layout(f, dim) for dim, f in fields.items()}
    twin = {}
    for dim in have:
        f = next(f for f in value.fields if dim in f.dims and units.growing(f) is not None)
        moved = units.free_units(Field(move(f.ids.expand(value.shape)), ()))
        for d, g in fields.items():
            # Where nothing is free, nothing has copies.
            if bool(((units.free_units(g) == moved) | (moved < 0)).all()):
                twin[dim] = d
    return Movement(move, value.shape, have, want, twin)


def _write(
    wide: WideGraph, node: fx.Node, source: fx.Node, result: fx.Node, movement: Movement
) -> fx.Node:
    """Writes a movement as `index_select` of the flat operand, sample by sample."""
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
        x = call(aten.reshape.default, (x, [*lead, *shape]))
        return call(aten.movedim.int, (x, 0, after[0])) if before else x


def _symbolic(value: Any) -> list[int]:
    """Dimensions whose size is not known before the network runs."""
    sizes: Sequence[Any] = value.shape
    return [d for d, size in enumerate(sizes) if not isinstance(size, int)]
