"""Where the units of the members land in the fused tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fxfuse.coupling import CouplingGraph, Index, Place
from fxfuse.errors import PlanError
from fxfuse.labels import Kind
from fxfuse.plan import FusionPlan, Weights


@dataclass(frozen=True)
class Placement:
    """Where the indices of one dimension come from.

    Attributes:
        size: Size of the fused dimension.
        targets: For each member, indices of the fused dimension, int64 [k].
        sources: For each member, the indices of the member that land there, int64 [k].
        merge: For each member, the entries of M, float64 [k]; 1 where no group owns the index.
        unmerge: The same for U.
    """

    size: int
    targets: tuple[Index, ...]
    sources: tuple[Index, ...]
    merge: tuple[Weights, ...]
    unmerge: tuple[Weights, ...]


def place_units(graph: CouplingGraph, plan: FusionPlan, place: Place) -> Placement:
    """Placement at member width: fused unit k stands where unit k of a member stands.

    Raises:
        PlanError: The plan has another width in one of the place's groups.
    """
    size = int(graph.captured.tensor(place[0]).shape[place[1]])
    groups = graph.group_of.get(place, ())
    targets, sources, merge, unmerge = [], [], [], []
    for member in range(plan.n_members):
        fixed = _fixed(graph, plan, place, member)
        to, origin = [fixed], [fixed]
        weights = [np.ones((2, len(fixed)))]
        for group in groups:
            unit_map = plan.map_of(group.name)
            if unit_map.n_units != group.n_units:
                raise PlanError(
                    f"group {group.name!r} has {unit_map.n_units} fused units, "
                    f"the members have {group.n_units}",
                    why="this placement is for member width",
                )
            target, unit = unit_map.of_member(member)
            rows = group.index[place]
            to.append(rows[target].reshape(-1))
            origin.append(rows[unit].reshape(-1))
            both = np.stack(unit_map.weights_of(member))
            weights.append(np.repeat(both, rows.shape[1], axis=1))
        targets.append(np.concatenate(to))
        sources.append(np.concatenate(origin))
        m, u = np.concatenate(weights, axis=1)
        merge.append(m)
        unmerge.append(u)
    return Placement(size, tuple(targets), tuple(sources), tuple(merge), tuple(unmerge))


def _fixed(graph: CouplingGraph, plan: FusionPlan, place: Place, member: int) -> Index:
    """Frozen indices that a member contributes to: those inside the network are the host's."""
    reason = graph.frozen.get(place)
    if reason is None or (reason.kind is Kind.HOST and member != plan.host):
        return np.empty(0, dtype=np.int64)
    return reason.indices


@dataclass(frozen=True)
class Layout:
    """Order of the copies of every index along one dimension of a concatenated network.

    Attributes:
        source: int64 [new size]: the member's index of which this is a copy.
        copy: int64 [new size]: the member that it comes from; -1 where all members share it.
    """

    source: Index
    copy: Index

    @property
    def size(self) -> int:
        """Size of the concatenated dimension."""
        return len(self.source)

    def by_index(self) -> Layout:
        """The same copies, those of an index next to each other."""
        return self.by_block(1)

    def by_block(self, size: int) -> Layout:
        """The same copies, those of `size` successive indices in one piece."""
        order = np.lexsort((self.source, self.copy, self.source // size))
        return Layout(self.source[order], self.copy[order])

    def after(self, other: Layout, size: int) -> Layout:
        """Two concatenated dimensions: this one behind `other`, which has `size` indices."""
        return Layout(
            np.concatenate([other.source, self.source + size]),
            np.concatenate([other.copy, self.copy]),
        )

    def repeated(self, size: int) -> Layout:
        """Every index becomes `size` successive ones, in one piece."""
        source = self.source[:, None] * size + np.arange(size)
        return Layout(source.reshape(-1), np.repeat(self.copy, size))

    def head(self, size: int) -> Layout:
        """The copies of the first `size` indices."""
        kept = self.source < size
        return Layout(self.source[kept], self.copy[kept])


def default_layout(graph: CouplingGraph, place: Place, n_members: int) -> Layout:
    """Copies of a unit stand next to each other, each run of its slots in one piece.

    Such an order survives the views that split or merge dimensions: a head's channels stay
    together, and so do the pixels of a flattened channel.
    """
    size = int(graph.captured.tensor(place[0]).shape[place[1]])
    unit = np.full(size, -1, dtype=np.int64)
    offset = 0
    for group in graph.group_of.get(place, ()):
        rows = group.index[place]
        unit[rows.reshape(-1)] = offset + np.repeat(np.arange(len(rows)), rows.shape[1])
        offset += len(rows)
    starts = np.flatnonzero(np.r_[True, (unit[1:] != unit[:-1]) | (unit[1:] < 0)])
    source, copy = [], []
    for start, end in zip(starts, np.r_[starts[1:], size], strict=True):
        run = np.arange(start, end)
        if unit[start] < 0:
            source.append(run)
            copy.append(np.full(len(run), -1))
        else:
            source.append(np.tile(run, n_members))
            copy.append(np.repeat(np.arange(n_members), len(run)))
    return Layout(np.concatenate(source), np.concatenate(copy))


def place_copies(
    graph: CouplingGraph, plan: FusionPlan, place: Place, layouts: Mapping[Place, Layout]
) -> Placement:
    """Placement in the concatenated network."""
    layout = layouts.get(place) or default_layout(graph, place, plan.n_members)
    targets, sources = [], []
    reason = graph.frozen.get(place)
    for member in range(plan.n_members):
        own = layout.copy == member
        if reason is None or reason.kind is not Kind.HOST or member == plan.host:
            own |= layout.copy < 0
        targets.append(np.flatnonzero(own))
        sources.append(layout.source[own])
    ones = tuple(np.ones(len(index)) for index in targets)
    return Placement(layout.size, tuple(targets), tuple(sources), ones, ones)
