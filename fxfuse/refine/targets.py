"""What a node of the fused network should be: the members' values, merged by the plan's maps.

For a group, the fused activation is Σ_i M⁽ⁱ⁾ · (activation of member i): with one-hot maps the
activations of the kept units. Where a dimension is the base member's, so is the value; where an
index has
one meaning for all members (the logits, say), the members' mean is taken; in the head of one
member, its own value. Where the fused network has another size, the units stand as its layouts say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import fx

from fxfuse.analysis.coupling import CouplingGraph, Index, Place
from fxfuse.analysis.labels import AbstractTensor, DimLabels, Kind, neurons
from fxfuse.planning.plan import FusionPlan
from fxfuse.transform.layout import Layout, Placements, copies_of, unit_copies


class Targets:
    """Merges values of the members into what the fused network should compute there.

    Args:
        graph: The analysis of the members.
        plan: Groups and maps.
        layouts: For nodes of the members' graph, the layouts of the dimensions that have another
            size in the fused network.
        asked_as: Nodes of another graph by which `merge` may name nodes of the members' graph.
        places: The layouts of the dimensions of parameters that have another size.
    """

    def __init__(
        self,
        graph: CouplingGraph,
        plan: FusionPlan,
        layouts: Mapping[fx.Node, Any] = MappingProxyType({}),
        asked_as: Mapping[fx.Node, fx.Node] = MappingProxyType({}),
        places: Mapping[Place, Layout] = MappingProxyType({}),
    ) -> None:
        self.graph = graph
        self.plan = plan
        self.layouts = layouts
        self.asked_as = asked_as
        self.copies = copies_of(graph, plan.sizes())
        self.n_members = plan.n_members
        #: For each member: fused neuron (`_key`), member's neuron, weight; sorted by fused neuron.
        self.entries = [self._entries(member) for member in range(plan.n_members)]
        self.told = self._told()
        self._mergers: dict[fx.Node, list[_Merger] | None] = {}
        self._placements = Placements(graph, plan, places)

    def merge(self, node: fx.Node, values: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
        """The fused value of a node.

        Args:
            node: The node.
            values: Its value in each member, with any batch size; None in a member that does not
                have the node, which lies in the head of another one.

        Returns:
            A tensor of the shape that the fused network has there; None where no member has the
            value: two dimensions at once are divided among the members, or units of all members
            are in the head of one.
        """
        mergers = self._found(node)
        own = [value for value in values if value is not None]
        if mergers is None or not own:
            return None
        if not mergers:
            return torch.stack(own).mean(0)
        if len(own) < len(values):
            return None
        if not any(len(merger.places) for merger in mergers):
            return None
        result = own[0].new_zeros(mergers[0].fused_shape(own[0].shape))
        for merger, value in zip(mergers, own, strict=True):
            merger.add_to(result, value)
        return result

    def is_along(self, node: fx.Node, dim: int) -> bool:
        """Whether `merge` treats all places along the other dimensions of a node's value alike.

        Then it can be given rows of the value, `dim` last (`merge_lines`).
        """
        mergers = self._found(node)
        if not mergers:
            return mergers is not None
        rank = len(self.graph.values[self.asked_as.get(node, node)].shape)
        return all([d % rank for d in merger.dims] == [dim % rank] for merger in mergers)

    def is_sure(self, node: fx.Node) -> bool:
        """Whether `merge` has a value, whatever the members' are, as long as all have one."""
        mergers = self._found(node)
        return mergers is not None and (
            not mergers or any(len(merger.places) for merger in mergers)
        )

    def merge_lines(
        self, node: fx.Node, values: Sequence[torch.Tensor | None]
    ) -> torch.Tensor | None:
        """The fused value of some rows [n, units] of a node's value (`is_along`), as `merge`."""
        mergers = self._found(node)
        own = [value for value in values if value is not None]
        if not mergers:
            return torch.stack(own).mean(0) if own and mergers is not None else None
        if len(own) < len(values) or not any(len(merger.places) for merger in mergers):
            return None
        result = own[0].new_zeros(len(own[0]), mergers[0].sizes[0])
        for merger, value in zip(mergers, own, strict=True):
            merger.add_along(result, value, 1)
        return result

    def _found(self, node: fx.Node) -> list[_Merger] | None:
        node = self.asked_as.get(node, node)
        if node not in self._mergers:
            self._mergers[node] = self._mergers_of(node)
        return self._mergers[node]

    def merge_rows(self, place: Place, values: Sequence[torch.Tensor]) -> torch.Tensor | None:
        """The fused value of what stands along a dimension of a parameter: of gates, say.

        Args:
            place: The parameter's canonical name, and the dimension.
            values: In each member that has it, [..., indices].

        Returns:
            [..., fused indices]; None where units of all members are in the head of one.
        """
        if place[0] in self.graph.program.heads:
            return None if place in self.graph.group_of else values[0]
        found, reason = self._placements[place], self.graph.frozen.get(place)
        # What all members share comes before the units.
        shared = 0 if reason is None or reason.kind is Kind.KEEP_BASE else len(reason.indices)
        result = values[0].new_zeros(*values[0].shape[:-1], found.size)
        columns = zip(found.targets, found.sources, found.merge, values, strict=True)
        for targets, sources, merge, value in columns:
            weights = np.where(np.arange(len(merge)) < shared, merge / self.n_members, merge)
            to, source, weight = (
                torch.from_numpy(x).to(value.device) for x in (targets, sources, weights)
            )
            result.index_add_(-1, to, value[..., source] * weight.to(value.dtype))
        return result

    def _mergers_of(self, node: fx.Node) -> list[_Merger] | None:
        value: Any = self.graph.values.get(node)
        if not isinstance(value, AbstractTensor):
            return None
        told = [f for f in value.fields if self._is_told(f)]
        layouts: Mapping[int, Layout] = self.layouts.get(node) or {}
        grown = [f for f in told if not layouts.keys().isdisjoint(f.dims)]
        if len(told) > 1 or len(layouts) > len(grown):
            return None
        if not told:
            return []
        places, members = _places_of(told[0], layouts), range(self.n_members)
        own = [self._field_of(node, member, value.fields.index(told[0])) for member in members]
        if any(f is None or f.dims != told[0].dims for f in own):
            return None
        return [
            self._merger(told[0], f, places, member)
            for member, f in zip(members, own, strict=True)
            if f is not None
        ]

    def _field_of(self, node: fx.Node, member: int, number: int) -> DimLabels | None:
        """A field of the node's value in a member, by its number; None where there is none."""
        own = self.graph.of_member(member).values[self.graph.node_of(node, member)]
        found = own.fields if isinstance(own, AbstractTensor) else ()
        return found[number] if number < len(found) else None

    def _is_told(self, f: DimLabels) -> bool:
        return bool(self.told[f.held].any())

    def _merger(self, f: DimLabels, theirs: DimLabels, at: _Places, member: int) -> _Merger:
        """Where along a field each place of the fused network comes from in one member."""
        place_ids = f.ids.reshape(-1).numpy()[at.source]
        ids = theirs.ids.reshape(-1).numpy()
        own = neurons(f.bare).reshape(-1).numpy()[at.source]
        fused, source, weight = self.entries[member]
        keys = self._key(own, at.copy)
        first = np.searchsorted(fused, keys, side="left")
        last = np.searchsorted(fused, keys, side="right")
        order = np.argsort(ids, kind="stable")
        places, places_in, weights = [], [], []
        for step in range(int((last - first).max(initial=0))):
            has = np.flatnonzero(first + step < last)
            entry = first[has] + step
            # The part of a place is the same for the neuron that takes the place.
            wanted = source[entry] + (place_ids[has] - own[has])
            found_at = order[np.minimum(np.searchsorted(ids[order], wanted), len(ids) - 1)]
            found = ids[found_at] == wanted
            places.append(has[found])
            places_in.append(found_at[found])
            weights.append(weight[entry][found])
        none = np.empty(0, dtype=np.int64)
        return _Merger(
            f.dims,
            at.sizes,
            np.concatenate([none, *places]),
            np.concatenate([none, *places_in]),
            np.concatenate([np.empty(0), *weights]),
        )

    def _key(self, neuron: Index, copy: Index) -> Index:
        """The number of a fused neuron: a copy of a member's neuron, int64."""
        return neuron + copy * self.graph.coupling.count

    def _entries(self, member: int) -> tuple[Index, Index, np.ndarray]:
        coupling, theirs = self.graph.coupling, self.graph.of_member(member)
        fused, source, weight = [], [], []
        # Owners are the same in all members, each with as many neurons as it has units there.
        for owner, place in enumerate(coupling.owners):
            start, own_start = coupling.starts[owner], theirs.coupling.starts[owner]
            rest = np.ones(len(coupling.ids_of(owner)), dtype=bool)
            own_rest = np.ones(len(theirs.coupling.ids_of(owner)), dtype=bool)
            own_index = {g.name: g.index[place] for g in theirs.group_of.get(place, ())}
            for group in self.graph.group_of.get(place, ()):
                rows, own = group.index[place], own_index[group.name]
                rest[rows.reshape(-1)] = False
                own_rest[own.reshape(-1)] = False
                unit_map = self.plan.map_of(group.name)
                chosen = unit_map.member == member
                to, unit = unit_map.target[chosen], unit_map.unit[chosen]
                one_each = np.ones(group.n_units, dtype=np.int64)
                template, copy = unit_copies(self.copies.get(group.name, one_each))
                each = np.broadcast_to(unit_map.weight, unit_map.member.shape)[chosen]
                fused.append(self._key(start + rows[template[to]], copy[to, None]).reshape(-1))
                source.append(own_start + own[unit].reshape(-1))
                weight.append(np.repeat(each, rows.shape[1]))
            if rest.sum() != own_rest.sum():
                # What no parameter owns has no counterpart at another width.
                continue
            left = start + np.flatnonzero(rest)
            reason = self.graph.frozen.get(place)
            if reason is not None and reason.kind is Kind.KEEP_BASE:
                share = np.full(len(left), float(member == self.plan.base_member))
            else:
                share = np.full(len(left), 1.0 / self.n_members)
            fused.append(left)
            source.append(own_start + np.flatnonzero(own_rest))
            weight.append(share)
        # Padding is no neuron: what is there is the same for all.
        flat = [np.concatenate([np.zeros(1, np.int64), *fused])]
        flat.append(np.concatenate([np.zeros(1, np.int64), *source]))
        shares = np.concatenate([np.full(1, 1.0 / self.n_members), *weight])
        order = np.argsort(flat[0], kind="stable")
        keep = order[shares[order] != 0]
        return flat[0][keep], flat[1][keep], shares[keep]

    def _told(self) -> np.ndarray:
        """Which neurons are not the same thing in all members: bool [ids]."""
        coupling = self.graph.coupling
        told = np.zeros(coupling.count, dtype=bool)
        for owner, place in enumerate(coupling.owners):
            reason = self.graph.frozen.get(place)
            if reason is not None and reason.kind is Kind.KEEP_BASE:
                told[coupling.starts[owner] + reason.indices] = True
            for group in self.graph.group_of.get(place, ()):
                told[coupling.starts[owner] + group.index[place].reshape(-1)] = True
        return told


class _Places(NamedTuple):
    """The places of a field in the fused network.

    Attributes:
        sizes: Sizes of the field's dimensions there.
        source: The place of the members' field of which each is a copy, int64 [places].
        copy: Number of the copy, int64 [places].
    """

    sizes: tuple[int, ...]
    source: Index
    copy: Index


def _places_of(f: DimLabels, layouts: Mapping[int, Layout]) -> _Places:
    """The places of a field, of which one dimension at most has a layout."""
    sizes = [f.ids.shape[dim] for dim in f.dims]
    source = np.arange(f.ids.numel()).reshape(sizes)
    copy = np.zeros_like(source)
    for axis, dim in enumerate(f.dims):
        if dim in layouts:
            source = source.take(layouts[dim].source, axis)
            # What all members share is a copy of nothing else.
            copies = np.maximum(layouts[dim].copy, 0)
            line = [-1 if a == axis else 1 for a in range(len(sizes))]
            copy = np.broadcast_to(copies.reshape(line), source.shape)
    return _Places(source.shape, source.reshape(-1), copy.reshape(-1))


class _Merger:
    """One member's contribution along the dimensions of a field.

    Args:
        dims: The dimensions.
        sizes: Their sizes in the fused network.
        places: Places there, int64 [n].
        sources: Where the members' values of these stand, int64 [n].
        weights: Their weights, float64 [n].
    """

    def __init__(
        self,
        dims: tuple[int, ...],
        sizes: tuple[int, ...],
        places: Index,
        sources: Index,
        weights: np.ndarray,
    ) -> None:
        self.dims = dims
        self.sizes = sizes
        self.places = torch.from_numpy(places)
        self.sources = torch.from_numpy(sources)
        self.weights = torch.from_numpy(weights)
        self.is_plain = bool((weights == 1).all())

    def fused_shape(self, shape: torch.Size) -> list[int]:
        """The shape in the fused network of what has `shape` in a member."""
        fused = list(shape)
        for dim, size in zip(self.dims, self.sizes, strict=True):
            fused[dim] = size
        return fused

    def add_to(self, result: torch.Tensor, value: torch.Tensor) -> None:
        """Adds the contribution of the member's value to a result of the fused shape, in place."""
        if not len(self.places):
            return
        if len(self.dims) == 1:
            self.add_along(result, value, self.dims[0] % value.dim())
            return
        places, sources = self.places.to(value.device), self.sources.to(value.device)
        front = tuple(range(len(self.dims)))
        moved = value.movedim(self.dims, front)
        rest = moved.shape[len(front) :]
        taken = moved.reshape(-1, rest.numel())[sources]
        taken = taken * self.weights.to(value.device, value.dtype)[:, None]
        lines = taken.new_zeros(prod(self.sizes), taken.shape[1]).index_add_(0, places, taken)
        result += lines.reshape(*self.sizes, *rest).movedim(front, self.dims)

    def add_along(self, result: torch.Tensor, value: torch.Tensor, dim: int) -> None:
        """Adds the contribution of a value whose merged dimension is `dim`, in place."""
        places, sources = self.places.to(value.device), self.sources.to(value.device)
        taken = value.index_select(dim, sources)
        if not self.is_plain:
            shape = [-1 if d == dim else 1 for d in range(value.dim())]
            taken = taken * self.weights.to(value.device, value.dtype).reshape(shape)
        result.index_add_(dim, places, taken)
