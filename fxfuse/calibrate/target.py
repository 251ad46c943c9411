"""What a node of the fused network should be: the members' values, merged by the plan's maps.

For a group, the fused activation is Σ_i M⁽ⁱ⁾ · (activation of member i): with one-hot maps the
activations of the kept units. Where a dimension is the host's, so is the value; where an index has
one meaning for all members (the logits, say), the members' mean is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from fxfuse.coupling import CouplingGraph, Index
from fxfuse.labels import Field, Kind, Value, neurons
from fxfuse.plan import FusionPlan


class Targets:
    """Merges values of the members into what the fused network should compute there.

    Args:
        graph: The analysis of the members.
        plan: Groups and maps.
    """

    def __init__(self, graph: CouplingGraph, plan: FusionPlan) -> None:
        self.graph = graph
        self.plan = plan
        self.n_members = plan.n_members
        #: For each member: fused neuron, member's neuron, weight; sorted by fused neuron.
        self.entries = [self._entries(member) for member in range(plan.n_members)]
        self.told = self._told()
        self._mergers: dict[fx.Node, list[_Merger] | None] = {}

    def merge(self, node: fx.Node, values: Sequence[torch.Tensor]) -> torch.Tensor | None:
        """The fused value of a node.

        Args:
            node: The node.
            values: Its value in each member, of the node's shape (with any batch size).

        Returns:
            A tensor of the same shape; None where two dimensions at once are divided among the
            members, so that no member has the value.
        """
        if node not in self._mergers:
            self._mergers[node] = self._mergers_of(node)
        mergers = self._mergers[node]
        if mergers is None:
            return None
        if not mergers:
            return torch.stack(list(values)).mean(0)
        if not any(len(merger.places) for merger in mergers):
            return None
        result = torch.zeros_like(values[0])
        for merger, value in zip(mergers, values, strict=True):
            merger.add_to(result, value)
        return result

    def _mergers_of(self, node: fx.Node) -> list[_Merger] | None:
        value: Any = self.graph.values.get(node)
        if not isinstance(value, Value):
            return None
        told = [f for f in value.fields if self._is_told(f)]
        if len(told) > 1:
            return None
        if not told:
            return []
        return [self._merger(told[0], member) for member in range(self.n_members)]

    def _is_told(self, f: Field) -> bool:
        return bool(self.told[np.unique(neurons(f.ids).numpy())].any())

    def _merger(self, f: Field, member: int) -> _Merger:
        """Where along a field each place comes from in one member."""
        ids = f.ids.reshape(-1).numpy()
        own = neurons(f.ids).reshape(-1).numpy()
        fused, source, weight = self.entries[member]
        first = np.searchsorted(fused, own, side="left")
        last = np.searchsorted(fused, own, side="right")
        order = np.argsort(ids, kind="stable")
        places, places_in, weights = [], [], []
        for step in range(int((last - first).max(initial=0))):
            has = np.flatnonzero(first + step < last)
            entry = first[has] + step
            # The part of a place is the same for the neuron that takes the place.
            wanted = source[entry] + (ids[has] - own[has])
            at = order[np.minimum(np.searchsorted(ids[order], wanted), len(ids) - 1)]
            found = ids[at] == wanted
            places.append(has[found])
            places_in.append(at[found])
            weights.append(weight[entry][found])
        if not places:
            empty = np.empty(0, dtype=np.int64)
            return _Merger(f.dims, len(ids), empty, empty, np.empty(0))
        return _Merger(
            f.dims,
            len(ids),
            np.concatenate(places),
            np.concatenate(places_in),
            np.concatenate(weights),
        )

    def _entries(self, member: int) -> tuple[Index, Index, np.ndarray]:
        ledger = self.graph.ledger
        fused, source, weight = [], [], []
        for owner, place in enumerate(ledger.owners):
            start = ledger.starts[owner]
            owned = np.zeros(len(ledger.ids_of(owner)), dtype=bool)
            for group in self.graph.group_of.get(place, ()):
                rows = group.index[place]
                owned[rows.reshape(-1)] = True
                unit_map = self.plan.map_of(group.name)
                chosen = unit_map.member == member
                to, unit = unit_map.target[chosen], unit_map.unit[chosen]
                each = np.broadcast_to(unit_map.weight, unit_map.member.shape)[chosen]
                fused.append(start + rows[to].reshape(-1))
                source.append(start + rows[unit].reshape(-1))
                weight.append(np.repeat(each, rows.shape[1]))
            rest = start + np.flatnonzero(~owned)
            reason = self.graph.frozen.get(place)
            if reason is not None and reason.kind is Kind.HOST:
                share = np.full(len(rest), float(member == self.plan.host))
            else:
                share = np.full(len(rest), 1.0 / self.n_members)
            fused.append(rest)
            source.append(rest)
            weight.append(share)
        # Padding is no neuron: what stands there is the same for all.
        flat = [np.concatenate([np.zeros(1, np.int64), *fused])]
        flat.append(np.concatenate([np.zeros(1, np.int64), *source]))
        shares = np.concatenate([np.full(1, 1.0 / self.n_members), *weight])
        order = np.argsort(flat[0], kind="stable")
        keep = order[shares[order] != 0]
        return flat[0][keep], flat[1][keep], shares[keep]

    def _told(self) -> np.ndarray:
        """Which neurons are not the same thing in all members: bool [ids]."""
        ledger = self.graph.ledger
        told = np.zeros(ledger.count, dtype=bool)
        for owner, place in enumerate(ledger.owners):
            reason = self.graph.frozen.get(place)
            if reason is not None and reason.kind is Kind.HOST:
                told[ledger.starts[owner] + reason.indices] = True
            for group in self.graph.group_of.get(place, ()):
                told[ledger.starts[owner] + group.index[place].reshape(-1)] = True
        return told


class _Merger:
    """One member's contribution along the dimensions of a field."""

    def __init__(
        self, dims: tuple[int, ...], size: int, places: Index, sources: Index, weights: np.ndarray
    ) -> None:
        self.dims = dims
        self.size = size
        self.places = torch.from_numpy(places)
        self.sources = torch.from_numpy(sources)
        self.weights = torch.from_numpy(weights)
        self.is_plain = bool((weights == 1).all())

    def add_to(self, result: torch.Tensor, value: torch.Tensor) -> None:
        """Adds the contribution of the member's value to a result of its shape, in place."""
        if not len(self.places):
            return
        places, sources = self.places.to(value.device), self.sources.to(value.device)
        if len(self.dims) == 1:
            dim = self.dims[0] % value.dim()
            taken = value.index_select(dim, sources)
            if not self.is_plain:
                shape = [-1 if d == dim else 1 for d in range(value.dim())]
                taken = taken * self.weights.to(value.device, value.dtype).reshape(shape)
            result.index_add_(dim, places, taken)
            return
        front = tuple(range(len(self.dims)))
        moved = value.movedim(self.dims, front)
        taken = moved.reshape(self.size, -1)[sources]
        taken = taken * self.weights.to(value.device, value.dtype)[:, None]
        lines = taken.new_zeros(self.size, taken.shape[1]).index_add_(0, places, taken)
        result += lines.reshape(moved.shape).movedim(front, self.dims)
