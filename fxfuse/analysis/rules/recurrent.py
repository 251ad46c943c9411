"""Recurrent layers: a hidden unit is one row of every gate and one column of the recurrent weight.

Notation of shapes: b batch, t time step, i input channel, h hidden unit, g gate and unit (`k h`, k
the gates), r projected unit, n layer and direction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from fxfuse.analysis.coupling_constraints import CouplingConstraints
from fxfuse.analysis.labels import AbstractTensor, DimLabels, Kind, positions
from fxfuse.analysis.rules.algebra import (
    align,
    contract,
    drop,
    meet,
    merge_positions,
    only_unlabelled,
)
from fxfuse.analysis.rules.registry import Call, rule
from fxfuse.graph.operator_facts import FACTS, Recurrence, operators


@dataclass(frozen=True)
class Weights:
    """What one direction of one layer holds (values of the analysis, or graph nodes).

    Attributes:
        inner: [g, i].
        recurrent: [g, h], or [g, r] with a projection.
        biases: Each [g].
        projection: [r, h].
    """

    inner: Any
    recurrent: Any
    biases: tuple[Any, ...]
    projection: Any = None


def weights_of(parameters: Sequence[Any], *, has_biases: bool, parts: int) -> list[Weights]:
    """Cut an operator's flat list of parameters into layers and directions, `parts` in all."""
    size = len(parameters) // parts
    biases = 2 if has_biases else 0
    found = []
    for part in range(parts):
        inner, recurrent, *rest = parameters[part * size : (part + 1) * size]
        projection = rest[biases] if len(rest) > biases else None
        found.append(Weights(inner, recurrent, tuple(rest[:biases]), projection))
    return found


def gates_of(node: fx.Node) -> int:
    """Return the number of gates of a recurrent layer or cell."""
    facts = FACTS[node.target]
    assert isinstance(facts, Recurrence)
    return facts.gates


@rule(*operators(Recurrence, is_cell=False))
def layers(call: Call) -> list[AbstractTensor]:
    """`b t i → b t h` and the last states `n b h`; directions of a layer stand side by side."""
    coupling = call.coupling
    x, hx = call.argument("input"), call.argument("hx")
    states = list(hx) if isinstance(hx, list | tuple) else [hx]
    directions = 2 if call.argument("bidirectional") else 1
    time = 1 if call.argument("batch_first") else 0
    weights = weights_of(
        call.argument("params"),
        has_biases=call.argument("has_biases"),
        parts=directions * call.argument("num_layers"),
    )
    for state in states:
        _freeze_layers(coupling, state)
    x = only_unlabelled(coupling, x, [time], "a recurrent layer reads the steps in their order")
    finals: list[list[AbstractTensor]] = [[] for _ in states]
    for start in range(0, len(weights), directions):
        outputs = []
        for part in range(start, start + directions):
            initial = [_initial(state, part, time) for state in states]
            last = step(coupling, x, initial, weights[part], gates_of(call.node))
            for found, value in zip(finals, last, strict=True):
                found.append(drop(value, [time], keepdim=False).moved(lambda t: t.unsqueeze(0)))
            varying = positions(last[0].shape, [time])
            outputs.append(
                replace(last[0], positions=merge_positions((*last[0].positions, *varying)))
            )
        x = _side_by_side(coupling, outputs, x.rank - 1)
    return [x, *(_side_by_side(coupling, found, 0) for found in finals)]


@rule(*operators(Recurrence, is_cell=True))
def cell(call: Call) -> Any:
    """One step: `b i, b h → b h`."""
    x, hx = call.argument("input"), call.argument("hx")
    states = list(hx) if isinstance(hx, list | tuple) else [hx]
    names = ("w_ih", "w_hh", "b_ih", "b_hh")
    inner, recurrent, *biases = (call.argument(name) for name in names)
    weights = Weights(inner, recurrent, tuple(b for b in biases if b is not None))
    result = step(call.coupling, x, states, weights, gates_of(call.node))
    return result if isinstance(hx, list | tuple) else result[0]


def step(
    coupling: CouplingConstraints,
    x: AbstractTensor,
    initial: Sequence[AbstractTensor],
    weights: Weights,
    gates: int,
) -> list[AbstractTensor]:
    """Couple one direction of one layer: `* i → * h` for each state, the hidden state first.

    `initial` holds the states before the first step, each [* h] (sizes of 1 broadcast).
    """
    lead = "ABC"[: x.rank - 1]
    coupling.record_use(x)
    rows = contract(coupling, [(x, lead + "i"), (weights.inner, "gi")], lead + "g")
    for bias in weights.biases:
        for f in bias.fields:
            coupling.role(bias, f, reader=False)
        rows = meet(coupling, rows, align(bias, rows.rank))
    by_gate = rows.moved(lambda t: t.unflatten(-1, (gates, -1)))  # [* k h]
    gate = by_gate.rank - 2
    for f in by_gate.fields:
        if f.dims == (gate,):
            coupling.freeze(f, Kind.SHARED_INDEX, "gates are in order, and there is one unit")
        elif gate in f.dims:
            coupling.block(f, [gate])
    units = drop(by_gate, [gate], keepdim=False)
    hidden = units
    if weights.projection is not None:
        hidden = contract(coupling, [(units, lead + "h"), (weights.projection, "rh")], lead + "r")
    states = [hidden, units][: len(initial)]
    for place, (state, before) in enumerate(zip(states, initial, strict=True)):
        for f in before.fields:
            coupling.role(before, f, reader=False)
        states[place] = meet(coupling, state, before)
    again = contract(coupling, [(states[0], lead + "h"), (weights.recurrent, "gh")], lead + "g")
    meet(coupling, rows, again)
    for f in rows.fields:
        coupling.mix("an averaged activation passes a recurrent layer", ids=f)
    return [replace(state, shape=(*x.shape[:-1], state.shape[-1])) for state in states]


def _freeze_layers(coupling: CouplingConstraints, state: AbstractTensor) -> None:
    """Layers have an order: a state that is a parameter labels them."""
    for f in state.fields:
        if f.dims == (0,):
            kind = Kind.SHARED_INDEX if state.is_parameter else Kind.KEEP_BASE
            coupling.freeze(f, kind, "layers and directions are in order")


def _initial(state: AbstractTensor, part: int, time: int) -> AbstractTensor:
    """Return `n b h → b 1 h` (or `1 b h`) of one layer and direction."""
    return state.moved(lambda t: t[part].unsqueeze(time))


def _side_by_side(
    coupling: CouplingConstraints, parts: Sequence[AbstractTensor], dim: int
) -> AbstractTensor:
    """Concatenate along one dimension; units (along the last dimension) are not tied."""
    if len(parts) == 1:
        return parts[0]
    last = parts[0].rank - 1
    rows = [next((f.ids for f in v.fields if last in f.dims), None) for v in parts]
    shape = tuple(
        sum(v.shape[dim] for v in parts) if d == dim else s for d, s in enumerate(parts[0].shape)
    )
    found = [row for row in rows if row is not None]
    varying = frozenset[int]().union(*(v.unlabelled for v in parts))
    fields = [f for f in parts[0].fields if last not in f.dims]
    if len(found) == len(parts):
        wide = torch.broadcast_shapes(*(row.shape for row in found))
        joined = DimLabels.of(torch.cat([row.expand(wide) for row in found], dim))
        fields += [joined] if joined else []
    else:
        # A layer of one unit has no label: what is beside it must stay.
        for row in found:
            coupling.freeze(
                DimLabels(row, (last,)), Kind.KEEP_BASE, "is beside a layer without labels"
            )
        varying |= {dim, last}
    return AbstractTensor(tuple(shape), tuple(fields), positions(shape, varying))
