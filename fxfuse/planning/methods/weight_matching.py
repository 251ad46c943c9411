"""Averaging after alignment by weights (Git Re-Basin)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.spatial.distance import cdist

from fxfuse.analysis.coupling import CouplingGraph, CouplingGroup, Index, Place
from fxfuse.planning.context import Context, Reference, State
from fxfuse.planning.measured import Matrix
from fxfuse.planning.methods._alignment import (
    Features,
    Orders,
    UnmatchedUnits,
    averaged,
    best_order,
    common_orders,
    frame_of,
    surplus_of,
)
from fxfuse.planning.methods._from_input import Carried, carrying, from_the_input, shared
from fxfuse.planning.methods._unit_weights import (
    Tensors,
    moved,
    own_places,
    real_tensors,
    statistics_distance,
    units_of,
)
from fxfuse.planning.methods.registry import Method, method
from fxfuse.planning.plan import UnitMap

_SWEEPS = 20


@method("weight_matching")
@dataclass(frozen=True)
class WeightMatching(Method):
    """Matches the units of every member to those of the reference, then averages.

    Weight matching by coordinate descent (Ainsworth et al., "Git Re-Basin", arXiv:2209.04836,
    section 3.2), started from a matching of permutation-invariant statistics of each unit, which
    is exact for a permuted copy.

    Members of different widths: the assignments are rectangular, of smallest total squared
    distance, and start from a matching by the weights that write each unit, from the input on. A
    unit of a wider member that is left over writes nothing, and is read off the unit of its own
    member that is written most alike, by least squares on these weights: a copy of a unit is read
    off it, and one that nothing writes is left out.

    Attributes:
        reference: Member that the others are aligned to, by number, or `mean`: each to the mean of
            the others. Where members differ in width, the result has this member's (member 0's
            for `mean`).
    """

    reference: Reference = 0

    @property
    def weights_only(self) -> bool:
        """Whether it looks at weights only: always."""
        return True

    def maps(
        self, graph: CouplingGraph, states: Sequence[State], context: Context
    ) -> tuple[UnitMap, ...]:
        """Make the maps."""
        first = frame_of(graph, len(states), self.reference, context)
        frame = graph.of_member(first)

        def features(member: int) -> Features:
            return real_tensors(graph, states[member])

        def align(target: Features, member: int, start: Orders | None) -> Orders:
            own, theirs = graph.of_member(member), features(member)
            if start is None:
                start = _start(frame, own, target, theirs)
            return _descend(frame, own, target, theirs, start)

        def reorder(found: Features, member: int, orders: Orders) -> Features:
            own = graph.of_member(member)
            pairs = {g.name: _pair(g, orders[g.name], None) for g in own.groups if own is not frame}
            return {
                name: _reordered(frame, own, name, w, orders, pairs) for name, w in found.items()
            }

        orders = common_orders(
            graph, features, len(states), self.reference, context, align, reorder
        )
        if not graph.members:
            return averaged(frame, orders)
        ours = features(first)
        surplus = [
            _surplus(frame, graph.of_member(member), ours, features(member), order)
            for member, order in enumerate(orders)
        ]
        return averaged(frame, orders, surplus)


def _start(frame: CouplingGraph, own: CouplingGraph, ours: Tensors, theirs: Tensors) -> Orders:
    if own is frame:
        each = {g.name: statistics_distance(frame, own, g.name, ours, theirs) for g in own.groups}
        return {name: best_order(-distance) for name, distance in each.items()}
    orders: Orders = {}

    def solve(group: CouplingGroup, distance: Matrix, features: Matrix) -> tuple[Matrix, Matrix]:
        order = orders[group.name] = best_order(-(distance**2))
        return _pair(group, order, surplus_of(features, order))

    from_the_input(frame, own, ours, theirs, solve)
    return orders


def _surplus(
    frame: CouplingGraph, own: CouplingGraph, ours: Tensors, theirs: Tensors, orders: Orders
) -> dict[str, UnmatchedUnits]:
    """Return what the units of a member that are left over are read off, given its orders."""
    found = {}

    def solve(group: CouplingGroup, distance: Matrix, features: Matrix) -> tuple[Matrix, Matrix]:
        found[group.name] = surplus_of(features, orders[group.name])
        return _pair(group, orders[group.name], found[group.name])

    from_the_input(frame, own, ours, theirs, solve)
    return found


def _pair(
    group: CouplingGroup, order: Index, surplus: UnmatchedUnits | None
) -> tuple[Matrix, Matrix]:
    """Return M and U of a member, [n, m] both."""
    standing = np.flatnonzero(order >= 0)
    merge = np.zeros((len(order), group.n_units))
    merge[standing, order[standing]] = 1.0
    unmerge = merge.copy()
    if surplus is not None:
        unmerge[surplus.target, surplus.unit] = surplus.read
    return merge, unmerge


def _descend(
    frame: CouplingGraph, own: CouplingGraph, ours: Features, theirs: Features, start: Orders
) -> Orders:
    order = dict(start)
    for _ in range(_SWEEPS):
        changed = False
        surplus = {} if own is frame else _surplus(frame, own, ours, theirs, order)
        pairs = {g.name: _pair(g, order[g.name], surplus[g.name]) for g in own.groups if surplus}
        for group in own.groups:
            similarity = np.zeros((len(order[group.name]), group.n_units))
            standing = {name: held >= 0 for name, held in order.items()}
            for place, rows in own_places(own, group).items():
                name, dim = place
                found = _reordered(frame, own, name, theirs[name], order, pairs, skip=dim)
                member, there = units_of(found, dim, rows), frame.rows_of(group.name, place)
                if own is frame:
                    similarity += units_of(ours[name], dim, there) @ member.T
                    continue
                # Where not every unit is matched, the unmatched ones' norms count as well.
                common = shared(frame, name, ours[name], standing, skip=dim)
                similarity -= cdist(units_of(common, dim, there), member, "sqeuclidean")
            best = best_order(similarity, order[group.name])
            if not np.array_equal(best, order[group.name]):
                changed = True
                order[group.name] = best
                if pairs:
                    pairs[group.name] = _pair(group, best, None)
        if not changed:
            break
    return order


def _reordered(
    frame: CouplingGraph,
    own: CouplingGraph,
    name: str,
    weight: Matrix,
    order: Orders,
    pairs: Carried,
    *,
    skip: int | None = None,
) -> Matrix:
    """Return a member's tensor in the frame; with members of one width, a gather."""
    if own is not frame:
        return moved(own, name, weight, carrying(own, pairs), frame=frame, skip=skip)

    def move(group: CouplingGroup, place: Place, units: Matrix) -> Matrix:
        found = order[group.name]
        return np.where((found >= 0)[:, None], units[found], 0.0)

    return moved(own, name, weight, move, skip=skip)
