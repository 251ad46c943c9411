"""Where the units of the members land in the fused tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from fxfuse.analysis.coupling import CouplingGraph, CouplingGroup, Index, Place
from fxfuse.analysis.labels import Kind
from fxfuse.planning.plan import FusionPlan, Weights


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
        """Return the same copies, those of an index next to each other."""
        return self.by_block(1)

    def by_block(self, size: int) -> Layout:
        """Return the same copies, those of `size` successive indices in one piece."""
        order = np.lexsort((self.source, self.copy, self.source // size))
        return Layout(self.source[order], self.copy[order])

    def after(self, other: Layout, size: int) -> Layout:
        """Return two concatenated dimensions: this one behind `other`, which has `size` indices."""
        return Layout(
            np.concatenate([other.source, self.source + size]),
            np.concatenate([other.copy, self.copy]),
        )

    def repeated(self, size: int) -> Layout:
        """Every index becomes `size` successive ones, in one piece."""
        source = self.source[:, None] * size + np.arange(size)
        return Layout(source.reshape(-1), np.repeat(self.copy, size))

    def head(self, size: int) -> Layout:
        """Return the copies of the first `size` indices."""
        kept = self.source < size
        return Layout(self.source[kept], self.copy[kept])


#: For each group whose size changes: how many fused units take the place of each unit of a
#: member, int64 [units of a member].
Copies = Mapping[str, Index]


def copies_per_unit(n_units: int, n_fused: int) -> Index:
    """Return how many fused units take the place of each unit of a member, int64 [n_units].

    Every unit has as many as every other, or the first ones have one more: what is regular at the
    members' width stays so, and a shape literal can describe it.
    """
    each, rest = divmod(n_fused, n_units)
    return each + (np.arange(n_units) < rest).astype(np.int64)


def unit_copies(count: Index) -> tuple[Index, Index]:
    """Return in which unit's place each fused unit stands, and which copy of it it is.

    `count` is how many fused units take the place of each unit of a member, int64 [units].
    """
    return np.repeat(np.arange(len(count)), count), _counted(count)


def copies_of(graph: CouplingGraph, sizes: Mapping[str, int]) -> dict[str, Index]:
    """Return `Copies` of the groups that change their size."""
    return {
        group.name: copies_per_unit(group.n_units, sizes[group.name])
        for group in graph.groups
        if sizes.get(group.name, group.n_units) != group.n_units
    }


def default_layout(graph: CouplingGraph, place: Place, copies: Copies) -> Layout:
    """Copies of a unit stand next to each other, each run of its slots in one piece.

    Such an order survives the views that split or merge dimensions: a head's channels stay
    together, and so do the pixels of a flattened channel.
    """
    size = int(graph.program.tensor(place[0]).shape[place[1]])
    unit = np.full(size, -1, dtype=np.int64)
    count: list[Index] = []
    offset = 0
    for group in graph.group_of.get(place, ()):
        if group.name not in copies:
            continue
        rows = group.index[place]
        unit[rows.reshape(-1)] = offset + np.repeat(np.arange(len(rows)), rows.shape[1])
        count.append(copies[group.name])
        offset += len(rows)
    if not count:
        return Layout(np.arange(size), np.full(size, -1))
    return run_layout(unit, np.concatenate(count))


def run_layout(unit: Index, count: Index) -> Layout:
    """Return the copies of each run of one unit's neurons next to each other, each in one piece.

    Args:
        unit: The unit of each index, -1 where it is none that is copied, int64 [size].
        count: How many copies of each unit there are, int64 [units].
    """
    starts = np.flatnonzero(np.r_[True, (unit[1:] != unit[:-1]) | (unit[1:] < 0)])
    lengths = np.diff(np.r_[starts, len(unit)])
    copied = unit[starts] >= 0
    times = np.where(copied, count[unit[starts]], 1)
    # A piece is one copy of one run.
    run = np.repeat(np.arange(len(starts)), times)
    number = np.where(copied[run], _counted(times), -1)
    sizes = lengths[run]
    return Layout(np.repeat(starts[run], sizes) + _counted(sizes), np.repeat(number, sizes))


def _counted(sizes: Index) -> Index:
    """Return 0, 1, … up to each of some sizes, one after the other."""
    ends = np.cumsum(sizes)
    return np.arange(int(sizes.sum())) - np.repeat(ends - sizes, sizes)


def place_units(
    graph: CouplingGraph,
    plan: FusionPlan,
    place: Place,
    copies: Copies,
    layouts: Mapping[Place, Layout] = MappingProxyType({}),
) -> Placement:
    """Return where the units that a plan keeps land along a dimension."""
    size = int(graph.program.tensor(place[0]).shape[place[1]])
    groups = graph.group_of.get(place, ())
    resized = any(group.name in copies for group in groups)
    layout = None
    if resized:
        layout = layouts.get(place) or default_layout(graph, place, copies)
    at = _positions(size, layout)
    landing = {group.name: _landing(group, place, copies, at) for group in groups}
    targets, sources, merge, unmerge = [], [], [], []
    for member in range(plan.n_members):
        fixed = _fixed(graph, plan, place, member)
        to, origin = [at[fixed, 0]], [_fixed(graph.of_member(member), plan, place, member)]
        weights = [np.ones((2, len(fixed)))]
        for group in groups:
            unit_map = plan.map_of(group.name)
            target, unit = unit_map.of_member(member)
            rows = group.index[place]
            own = graph.of_member(member).rows_of(group.name, place)
            to.append(landing[group.name][target].reshape(-1))
            origin.append(own[unit].reshape(-1))
            both = np.stack(unit_map.weights_of(member))
            weights.append(np.repeat(both, rows.shape[1], axis=1))
        targets.append(np.concatenate(to))
        sources.append(np.concatenate(origin))
        m, u = np.concatenate(weights, axis=1)
        merge.append(m)
        unmerge.append(u)
    fused_size = size if layout is None else layout.size
    return Placement(fused_size, tuple(targets), tuple(sources), tuple(merge), tuple(unmerge))


def _landing(group: CouplingGroup, place: Place, copies: Copies, at: Index) -> Index:
    """Which indices each fused unit of a group owns in a place, int64 [fused units, slots]."""
    count = copies.get(group.name, np.ones(group.n_units, dtype=np.int64))
    template, copy = unit_copies(count)
    return at[group.index[place][template], copy[:, None]]


class Placements:
    """`place_units` for all tensors of a plan: dimensions with the same units share a placement."""

    def __init__(
        self,
        graph: CouplingGraph,
        plan: FusionPlan,
        layouts: Mapping[Place, Layout] = MappingProxyType({}),
    ) -> None:
        self._graph, self._plan, self._layouts = graph, plan, layouts
        self._copies = copies_of(graph, plan.sizes())
        self._made: dict[Any, Placement] = {}

    def __getitem__(self, place: Place) -> Placement:
        """Return where units land along a dimension."""
        # Placements differ wherever members differ in width, or a layout was made for the place.
        key = place if self._graph.members or place in self._layouts else self._content(place)
        if key not in self._made:
            told = self._graph, self._plan, place, self._copies, self._layouts
            self._made[key] = place_units(*told)
        return self._made[key]

    def _content(self, place: Place) -> Any:
        """Return all of the analysis that a placement depends on."""
        graph = self._graph
        reason = graph.frozen.get(place)
        return (
            int(graph.program.tensor(place[0]).shape[place[1]]),
            tuple((g.name, g.index[place].tobytes()) for g in graph.group_of.get(place, ())),
            reason and (reason.kind, reason.indices.tobytes()),
        )


def _positions(size: int, layout: Layout | None) -> Index:
    """Where each copy of each index stands, int64 [size, copies]; -1 where it stands nowhere."""
    if layout is None:
        return np.arange(size)[:, None]
    table = np.full((size, max(int(layout.copy.max()), 0) + 1), -1, dtype=np.int64)
    table[layout.source, np.maximum(layout.copy, 0)] = np.arange(layout.size)
    return table


def _fixed(graph: CouplingGraph, plan: FusionPlan, place: Place, member: int) -> Index:
    """Frozen indices that a member contributes to; the base member has those inside the network."""
    reason = graph.frozen.get(place)
    if reason is None or (reason.kind is Kind.KEEP_BASE and member != plan.base_member):
        return np.empty(0, dtype=np.int64)
    return reason.indices
