"""Where each member's own values are among those of the wide model, whatever its width.

The wide graph is written from member 0's. A member of another width has the same graph with other
sizes, so every node has a counterpart in it. Along a dimension that grows, an index of a member's
value is told by the unit it belongs to and by its place in the unit, which are the same in all.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import fx

from fxfuse.analysis.coupling import CouplingGraph, Index, Place
from fxfuse.analysis.labels import AbstractTensor, neurons
from fxfuse.planning.plan import FusionPlan
from fxfuse.transform.layout import Copies, Layout


class Counterparts:
    """The members' own graphs and values beside those that a wide model is written from."""

    def __init__(self, graph: CouplingGraph, plan: FusionPlan, copies: Copies) -> None:
        self.graph = graph
        self._template = _Roles(graph, copies, graph.coupling.owners)
        distinct = {id(g): g for g in graph.members}
        self._roles = {
            number: _Roles(g, copies, graph.coupling.owners) for number, g in distinct.items()
        }
        nodes = graph.program.graph.nodes
        self._originals = [
            {graph.node_of(node, member): node for node in nodes}
            for member in range(len(graph.members))
        ]
        #: For each group: the first fused unit in the place of each unit of member 0, and which
        #: unit of which member each fused unit is, int64 [fused units] both.
        self._fused: list[tuple[Index, Index, Index]] = []
        for name, count in copies.items():
            unit_map = plan.map_of(name)
            order = np.argsort(unit_map.target, kind="stable")
            starts = np.cumsum(count) - count
            self._fused.append((starts, unit_map.member[order], unit_map.unit[order]))

    def original_of(self, own: fx.Node, member: int) -> fx.Node:
        """Return the node that a node of a member's own graph is the counterpart of."""
        return self._originals[member][own] if self._originals else own

    def value_of(self, node: fx.Node, member: int) -> AbstractTensor:
        """Return the member's own labelled value of a node that returns a tensor."""
        value: AbstractTensor = self.graph.of_member(member).values[
            self.graph.node_of(node, member)
        ]
        return value

    def places(self, node: fx.Node, dim: int, layout: Layout, member: int) -> Index | None:
        """Return where each index of a member's own value stands along a dimension of the wide one.

        Args:
            node: A node of the graph that the wide one is written from, which returns a tensor.
            dim: The dimension.
            layout: Its layout in the wide graph.
            member: The member.

        Returns:
            int64 [size in the member]; None where the member's value is not there as a whole.
        """
        line = self._template.along(self.graph.values[node], dim)
        rows = line[layout.source]
        is_own = layout.copy < 0
        for number, (starts, members, units) in enumerate(self._fused):
            inside = np.flatnonzero((rows[:, 0] == number) & (layout.copy >= 0))
            fused = starts[rows[inside, 1]] + layout.copy[inside]
            is_own[inside] = members[fused] == member
            rows[inside, 1] = units[fused]
        theirs = self._roles.get(id(self.graph.of_member(member)), self._template)
        own = theirs.along(self.value_of(node, member), dim)
        found = np.flatnonzero(is_own)
        if len(found) != len(own):
            return None
        order, order_found = np.lexsort(own.T), np.lexsort(rows[found].T)
        if not np.array_equal(own[order], rows[found][order_found]):
            return None
        places = np.empty_like(found)
        places[order] = found[order_found]
        return places


class _Roles:
    """What each neuron of a network is to its unit.

    Args:
        graph: The analysis of the network.
        copies: The groups that count.
        owners: Places by which neurons are told apart; those of all members are the same.
    """

    def __init__(self, graph: CouplingGraph, copies: Copies, owners: list[Place]) -> None:
        coupling = graph.coupling
        component = coupling.components()
        unit_of = np.full((int(component.max(initial=0)) + 1, 2), -1, dtype=np.int64)
        part = np.full((coupling.count, 2), -1, dtype=np.int64)
        numbers: Mapping[str, int] = {name: number for number, name in enumerate(copies)}
        positions = {place: position for position, place in enumerate(owners)}
        for owner, place in enumerate(coupling.owners):
            for group in graph.group_of.get(place, ()):
                if group.name not in numbers:
                    continue
                ids = coupling.starts[owner] + group.index[place]
                unit_of[component[ids], 0] = numbers[group.name]
                unit_of[component[ids], 1] = np.arange(len(ids))[:, None]
                part[ids, 0] = positions[place]
                part[ids, 1] = np.arange(ids.shape[1])
        #: Group, unit, and place and slot in the unit of each neuron, -1 for none: [neurons, 4].
        self.table = np.concatenate([unit_of[component], part], axis=1)

    def along(self, value: AbstractTensor, dim: int) -> Index:
        """Return what stands at each index of a dimension, int64 [size, 5].

        These are the row of the table, and how often the same was there before.
        """
        ids = np.zeros(value.shape[dim], dtype=np.int64)
        for f in value.fields:
            if dim in f.dims:
                others = [d for d in f.dims if d != dim]
                found = neurons(f.bare)
                ids = (found.amax(others) if others else found).reshape(-1).numpy()
                break
        rows = self.table[ids]
        _, same = np.unique(rows, axis=0, return_inverse=True)
        before = np.empty(len(rows), dtype=np.int64)
        order = np.argsort(same.reshape(-1), kind="stable")
        ordered = same.reshape(-1)[order]
        before[order] = np.arange(len(rows)) - np.searchsorted(ordered, ordered)
        return np.concatenate([rows, before[:, None]], axis=1)
