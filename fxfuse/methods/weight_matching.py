"""Averaging after alignment by weights (Git Re-Basin)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fxfuse.calibrated import Matrix
from fxfuse.coupling import CouplingGraph, CouplingGroup
from fxfuse.methods._alignment import (
    Features,
    Orders,
    averaged,
    best_order,
    common_orders,
)
from fxfuse.methods._unit_weights import (
    moved,
    own_places,
    real_tensors,
    statistics_distance,
    units_of,
)
from fxfuse.methods.registry import check_variant, method
from fxfuse.options import Options, State
from fxfuse.plan import UnitMap

_SWEEPS = 20


@method("weight_matching")
def weight_matching(
    graph: CouplingGraph, states: Sequence[State], options: Options
) -> tuple[UnitMap, ...]:
    """Permutes the units of every member to those of the reference, then averages.

    Weight matching by coordinate descent (Ainsworth et al., "Git Re-Basin", arXiv:2209.04836,
    section 3.2), started from a matching of permutation-invariant statistics of each unit, which
    is exact for a permuted copy.

    Raises:
        ControlError: There is no such reference member.
        UnknownMethodError: A variant was asked for.
    """
    check_variant("weight_matching", options, ())

    def align(target: Features, member: Features, start: Orders | None) -> Orders:
        return _align(graph, target, member, start)

    def reorder(member: Features, orders: Orders) -> Features:
        return {name: _reordered(graph, name, w, orders) for name, w in member.items()}

    features = [real_tensors(graph, state) for state in states]
    return averaged(graph, common_orders(graph, features, options, align, reorder))


def _align(graph: CouplingGraph, ours: Features, theirs: Features, start: Orders | None) -> Orders:
    if start is None:
        order = {
            g.name: best_order(-statistics_distance(graph, g, ours, theirs)) for g in graph.groups
        }
    else:
        order = dict(start)
    for _ in range(_SWEEPS):
        changed = False
        for group in graph.groups:
            similarity = np.zeros((group.n_units, group.n_units))
            for (name, dim), rows in own_places(graph, group).items():
                reordered = _reordered(graph, name, theirs[name], order, skip=dim)
                similarity += units_of(ours[name], dim, rows) @ units_of(reordered, dim, rows).T
            best = best_order(similarity, order[group.name])
            changed |= not np.array_equal(best, order[group.name])
            order[group.name] = best
        if not changed:
            break
    return order


def _reordered(
    graph: CouplingGraph, name: str, weight: Matrix, order: Orders, *, skip: int | None = None
) -> Matrix:
    def move(group: CouplingGroup, units: Matrix) -> Matrix:
        return units[order[group.name]]

    return moved(graph, name, weight, move, skip=skip)
