"""Activations of units, where the layers that read them see them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import fx

from fxfuse.activations.calibration import CalibrationBatches
from fxfuse.activations.layers import Layer, layers_of
from fxfuse.activations.node_runner import NodeRunner
from fxfuse.activations.recurrence import readers_of
from fxfuse.analysis.coupling import CouplingGraph, CouplingGroup, Index
from fxfuse.analysis.heads import others_region, region_of
from fxfuse.analysis.labels import AbstractTensor, neurons

#: Rows of activations that are kept of a layer's input, for all calibration inputs together.
ROWS = 4096

Result = TypeVar("Result")


@dataclass(frozen=True)
class Consumer:
    """A layer that reads the units of a group.

    Attributes:
        slots: Which of its input channels each unit owns, int64 [n_units, slots].
        repeated: Whether the slots of a unit are one neuron at several places (a flattened image).
        owner: The member whose head the layer is in; None: it is in the trunk.
    """

    layer: Layer
    slots: Index
    repeated: bool
    owner: int | None = None


def consumers_of(graph: CouplingGraph) -> dict[str, list[Consumer]]:
    """For each group, the layers that read it, in the trunk and in the heads, in graph order.

    Recurrent layers are among them (`readers_of`), layers with groups of channels are not. Of a
    `trunk()` the heads are readers all the same.
    """
    found: dict[str, list[Consumer]] = {group.name: [] for group in graph.groups}
    whole = graph.whole or graph
    order = {node: place for place, node in enumerate(graph.program.graph.nodes)}
    layers = [*layers_of(graph.program), *readers_of(graph.program)]
    for layer in sorted(layers, key=lambda each: order[each.node]):
        place = (graph.program.canonical[layer.weight], layer.facts.inputs)
        if layer.groups > 1:
            continue
        owner = graph.program.heads.get(layer.weight)
        for group in whole.group_of.get(place, ()):
            slots = group.index[place]
            repeated = _is_repeated(graph, layer, slots)
            found[group.name].append(Consumer(layer, slots, repeated, owner))
    return found


def _trunk_consumers_of(graph: CouplingGraph) -> dict[str, list[Consumer]]:
    found = consumers_of(graph)
    return {name: [c for c in own if c.owner is None] for name, own in found.items()}


def consumer_inputs(
    graphs: Sequence[CouplingGraph],
    consumers: Sequence[Mapping[str, Sequence[Consumer]]],
    states: Mapping[int, Mapping[str, torch.Tensor]],
    calibration: CalibrationBatches,
    *,
    rows: int = ROWS,
) -> dict[Layer, list[torch.Tensor]]:
    """Return what the layers that read groups get, in each member.

    Where a head has computed it with tensors of its own (a norm, say), units of other members are
    not there, and count as zeros: the head has no tensors for them.

    Args:
        graphs: The analysis of each member.
        consumers: For each member, what `consumers_of` returned; of heads, those of `states`.
        states: Their tensors by name, by number of the member.
        calibration: The inputs.
        rows: About how many rows are kept; the same ones in all members.

    Returns:
        For each layer of the first member, one float32 tensor [rows, channels] per member.
    """
    each = [_in_order(*pair) for pair in zip(graphs, consumers, strict=True)]
    result: dict[Layer, list[torch.Tensor | None]] = {layer: [] for layer in each[0]}
    for graph, layers, (number, state) in zip(graphs, each, states.items(), strict=True):
        last = {layer.input: layer for layer in layers}
        runner = member_lane(graph, number, state, calibration, set(last))
        for layer, found in zip(layers, result.values(), strict=True):
            runner.run_to(layer.input)
            if layer.input in runner.absent:
                found.append(None)
                continue
            values = runner.value(layer.input)
            count = sum(layer.n_rows(x) for x in values)
            found.append(_some((layer.output_rows(x) for x in values), count, rows))
            if last[layer.input] is layer:
                runner.drop(layer.input)
    return {layer: _with_zeros(found) for layer, found in result.items()}


def _with_zeros(found: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
    """Return the members' rows, zeros where one has none; members with heads have one size."""
    like = next(x for x in found if x is not None)
    return [torch.zeros_like(like) if x is None else x for x in found]


def _in_order(graph: CouplingGraph, consumers: Mapping[str, Sequence[Consumer]]) -> list[Layer]:
    """Return the layers that read groups, each once, in graph order."""
    place = {node: place for place, node in enumerate(graph.program.graph.nodes)}
    layers = {c.layer: None for found in consumers.values() for c in found}
    return sorted(layers, key=lambda layer: place[layer.node])


def member_lane(
    graph: CouplingGraph,
    number: int,
    state: Mapping[str, torch.Tensor],
    calibration: CalibrationBatches,
    held: Collection[fx.Node] = (),
) -> NodeRunner:
    """A member on its way through the graph, without the other members' heads."""
    absent = others_region(graph.program, number)
    name = f"member {number}"
    return NodeRunner(graph.program, state, calibration, name=name, held=held, absent=absent)


def _some(parts: Iterable[torch.Tensor], count: int, rows: int) -> torch.Tensor:
    """About `rows` of all `count` rows [n, channels], float32: the same ones whoever's they are."""
    step = max(count // rows, 1)
    # A step that shares no factor with the image's width does not pick its columns.
    step += 1 - step % 2
    # Copies, so that no part is kept whole.
    return torch.cat([part[::step].float().clone() for part in parts])


def unit_activations(
    graph: CouplingGraph,
    states: Sequence[Mapping[str, torch.Tensor]],
    calibration: CalibrationBatches,
    *,
    rows: int = ROWS,
) -> dict[str, list[torch.Tensor]]:
    """Return activations of the units of each group, as the trunk's layers that read them see them.

    Returns:
        For each group, one float32 tensor [rows, n_units] per member; rows correspond across
        members. Rows of several layers, and of the slots of a unit, follow each other. A group that
        no layer reads is taken where its units last stand along one dimension; one whose units
        never do is left out.
    """
    graphs = [graph.of_member(member) for member in range(len(states))]
    consumers = each_once(_trunk_consumers_of, graphs)
    found = {}
    numbered = dict(enumerate(states))
    inputs = consumer_inputs(graphs, consumers, numbered, calibration, rows=rows)
    for name, readers in consumers[0].items():
        if readers:
            found[name] = [
                torch.cat(
                    [
                        _by_unit(inputs[first.layer][member], own.slots)
                        for first, own in zip(readers, consumers[member][name], strict=True)
                    ]
                )
                for member in range(len(states))
            ]
    unread = each_once(lambda g: _last_places(g, found), graphs)
    for number, (own, places) in enumerate(zip(graphs, unread, strict=True)):
        if not places:
            continue
        held = {place[0] for place in places.values()}
        runner = member_lane(own, number, states[number], calibration, held)
        runner.run_to(max(held, key=runner.order.__getitem__))
        for name, place in places.items():
            found.setdefault(name, []).append(_at_place(runner, *place, rows))
    return found


def each_once(
    function: Callable[[CouplingGraph], Result], graphs: Sequence[CouplingGraph]
) -> list[Result]:
    """What a function returns for each of some analyses; for equal ones it is called once."""
    known: dict[int, Result] = {}
    for graph in graphs:
        if id(graph) not in known:
            known[id(graph)] = function(graph)
    return [known[id(graph)] for graph in graphs]


def _last_places(
    graph: CouplingGraph, found: Collection[str]
) -> dict[str, tuple[fx.Node, int, Index]]:
    """Return `_last_place` of the groups that were not found yet, where they have one."""
    places = {g.name: _last_place(graph, g) for g in graph.groups if g.name not in found}
    return {name: place for name, place in places.items() if place is not None}


def _last_place(graph: CouplingGraph, group: CouplingGroup) -> tuple[fx.Node, int, Index] | None:
    """Find the last activation along one dimension of which all units of a group stand.

    Returns the node, the dimension, and where each unit stands along it, int64 [n_units, slots].
    """
    coupling = graph.coupling
    heads = region_of(graph.program, graph.program.heads)
    unit_of = np.full(coupling.count, -1)
    for owner, place in enumerate(coupling.owners):
        if place in group.index:
            ids = coupling.starts[owner] + group.index[place]
            unit_of[ids] = np.arange(group.n_units)[:, None]
    for node, value in reversed(list(graph.values.items())):
        if node in heads or not isinstance(value, AbstractTensor) or value.sources is not None:
            continue
        for f in value.fields:
            units = unit_of[neurons(f.bare).reshape(-1).numpy()]
            counts = np.bincount(units[units >= 0], minlength=group.n_units)
            if len(f.dims) == 1 and counts.min() > 0 and counts.min() == counts.max():
                standing = np.flatnonzero(units >= 0)
                order = standing[np.argsort(units[standing], kind="stable")]
                return node, f.dims[0], order.reshape(group.n_units, -1)
    return None


def _at_place(runner: NodeRunner, node: fx.Node, dim: int, slots: Index, rows: int) -> torch.Tensor:
    values = runner.value(node)
    count = sum(v.numel() // v.shape[dim] for v in values)
    lines = (v.movedim(dim, -1).reshape(-1, v.shape[dim]) for v in values)
    return _by_unit(_some(lines, count, rows), slots)


def _by_unit(x: torch.Tensor, slots: Index) -> torch.Tensor:
    """Return [rows, channels] → [rows · slots, n_units]."""
    return x[:, torch.from_numpy(slots).to(x.device)].transpose(1, 2).reshape(-1, len(slots))


def _is_repeated(graph: CouplingGraph, layer: Layer, slots: Index) -> bool:
    value = graph.values[layer.input]
    assert isinstance(value, AbstractTensor)
    dim = layer.facts.channels % value.rank
    for f in value.fields:
        if f.dims == (dim,):
            own = neurons(f.bare).reshape(-1).numpy()[slots]
            return bool((own == own[:, :1]).all())
    return False
