"""Recurrent layers and cells: every gate has its rows in the order of the units."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import fx

from fxfuse.analysis.labels import AbstractTensor
from fxfuse.analysis.rules import find, recurrent
from fxfuse.graph.arguments import argument
from fxfuse.transform.layout import Layout
from fxfuse.transform.resizing.operands import require, same, spread
from fxfuse.transform.resizing.state import ResizedGraph, cannot_write


def resize_recurrence(wide: ResizedGraph, node: fx.Node) -> Any:
    """Resize recurrent layers: every gate has its rows in the order of the units."""
    x, hx = argument(node, "input"), argument(node, "hx")
    states: list[fx.Node] = list(hx) if isinstance(hx, list | tuple) else [hx]
    is_cell = find(node.target) is recurrent.cell
    if is_cell:
        inner, again, *biases = (argument(node, n) for n in ("w_ih", "w_hh", "b_ih", "b_hh"))
        parts = [recurrent.Weights(inner, again, tuple(b for b in biases if b))]
        directions = 1
    else:
        directions = 2 if argument(node, "bidirectional") else 1
        parts = recurrent.weights_of(
            argument(node, "params"),
            has_biases=argument(node, "has_biases"),
            parts=directions * argument(node, "num_layers"),
        )
    last = wide.values[x].rank - 1
    incoming = wide.layout_of(x).get(last)
    if set(wide.layout_of(x)) - {last}:
        raise cannot_write(node, "a recurrent layer whose batch holds neurons is not rewritten")
    kept: list[list[Layout]] = [[] for _ in states]
    # What a direction hands on is its first state.
    size = wide.values[states[0]].shape[-1]
    for start in range(0, len(parts), directions):
        outgoing: list[Layout] = []
        for part in parts[start : start + directions]:
            both = _direction(wide, node, part, incoming)
            outgoing.append(both[0])
            for found, layout in zip(kept, both, strict=False):
                found.append(layout)
        incoming = outgoing[0]
        for layout in outgoing[1:]:
            incoming = layout.after(incoming, size)
    # One tensor may be both states.
    for state, layouts in dict(zip(states, kept, strict=True)).items():
        if not all(same(layout, layouts[0]) for layout in layouts):
            raise cannot_write(node, "one state holds layers that grow differently")
        spread(wide, node, state, wide.values[state].rank - 1, layouts[0])
    ends = [layouts[0] for layouts in kept]
    if is_cell:
        grown = [{last: end} for end in ends]
        return grown if isinstance(wide.values[node], list) else grown[0]
    return [{last: incoming}, *({last: end} for end in ends)]


def _direction(
    wide: ResizedGraph, node: fx.Node, part: recurrent.Weights, incoming: Layout | None
) -> tuple[Layout, Layout]:
    """Bring the parameters of one direction into order; layouts of both of its states."""
    gates = recurrent.gates_of(node)
    inner: AbstractTensor = wide.values[part.inner]
    size = inner.shape[0] // gates
    units = hidden = wide.units.index_layout(inner, 0, np.arange(size))
    rows = units
    for gate in range(1, gates):
        rows = units.after(rows, gate * size)
    require(wide, node, part.inner, 0, rows)
    require(wide, node, part.inner, 1, incoming)
    for operand in (part.recurrent, *part.biases):
        require(wide, node, operand, 0, rows)
    if part.projection is not None:
        value: AbstractTensor = wide.values[part.projection]
        hidden = wide.units.index_layout(value, 0, np.arange(value.shape[0]))
        require(wide, node, part.projection, 0, hidden)
        require(wide, node, part.projection, 1, units)
    require(wide, node, part.recurrent, 1, hidden)
    return hidden, units
