"""Alignment of units: members against a reference, or each against the mean of the others.

Every member gets one order in a common frame, so the way from one member to another is the one
through that frame, and going round a cycle of members is the identity. The frame is the
reference's units; with reference "mean", those of member 0. Orders are permutations where members
have one width. A narrower member leaves units of the frame without one of its own; the units that a
wider member has too many stand for no fused unit, and are read off those that do
(`UnmatchedUnits`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from fxfuse.analysis.coupling import CouplingGraph, Index
from fxfuse.errors import OptionError
from fxfuse.planning.context import Context, Reference
from fxfuse.planning.measured import Matrix
from fxfuse.planning.plan import UnitMap, Weights

#: For each group, which unit of a member stands for each unit of the frame, int64 [n]; -1: none.
Orders = dict[str, Index]

#: What members are compared by: matrices by the name of a tensor or of a group.
Features = Mapping[str, Matrix]

#: Aligns a member (by its number) to a target, starting from orders if there are.
Align = Callable[[Features, int, Orders | None], Orders]

#: Features of a member (by its number) with its units in other orders, 0 where it has none.
Reorder = Callable[[Features, int, Orders], Features]

#: A gain smaller than this, relative to the similarities, is rounding.
_GAIN = 1e-9
_ROUNDS = 20


@dataclass(frozen=True)
class UnmatchedUnits:
    """What units that stand for no fused unit are read off.

    Attributes:
        unit: Units of the member, int64 [k].
        target: The unit of the frame that each of them is most like, int64 [k].
        read: How much of it each of them is, float64 [k].
    """

    unit: Index
    target: Index
    read: Weights


def identity_orders(graph: CouplingGraph, frame: CouplingGraph) -> Orders:
    """Every unit in its place; units of the frame beyond the member's number stay without one."""
    sizes = {group.name: group.n_units for group in graph.groups}
    orders = {group.name: np.arange(group.n_units) for group in frame.groups}
    return {name: np.where(order < sizes[name], order, -1) for name, order in orders.items()}


def best_order(similarity: Matrix, held: Index | None = None) -> Index:
    """The assignment of largest total similarity; as many pairs as the smaller side has units.

    Args:
        similarity: Of each unit of the target (rows) and of the member (columns), [n, m].
        held: An assignment that is kept unless another one is truly better: ties and rounding would
            make a descent cycle.

    Returns:
        For each unit of the target, the member's, int64 [n]; -1 where there is none.
    """
    rows, columns = linear_sum_assignment(similarity, maximize=True)
    best = np.full(len(similarity), -1)
    best[rows] = columns
    if held is None:
        return best
    gain = _total(similarity, best) - _total(similarity, held)
    return best if gain > _GAIN * np.abs(similarity).sum() / max(len(best), 1) else held


def _total(similarity: Matrix, order: Index) -> float:
    matched = np.flatnonzero(order >= 0)
    return float(similarity[matched, order[matched]].sum())


def surplus_of(features: Matrix, order: Index, *, opposite: bool = False) -> UnmatchedUnits:
    """Read each unit that stands for none off the one it is most like, by least squares.

    So a unit that is a copy of another one is read off it, and one that is nothing is left out.

    Args:
        features: What each unit of the member is, float64 [n_units, k].
        order: Which of them stands for each unit of the frame, int64 [n]; -1: none.
        opposite: Whether a unit may be the opposite of another one.
    """
    target = np.flatnonzero(order >= 0)
    left = np.setdiff1d(np.arange(len(features)), order)
    if not len(target) or not len(left):
        none = np.empty(0, dtype=np.int64)
        return UnmatchedUnits(none, none, np.empty(0))
    standing = features[order[target]]
    product = features[left] @ standing.T
    product = product if opposite else np.maximum(product, 0.0)
    energy = (standing**2).sum(axis=1)
    energy = np.where(energy > 0, energy, np.inf)
    nearest = (product**2 / energy).argmax(axis=1)
    read = product[np.arange(len(left)), nearest] / energy[nearest]
    some = read != 0
    return UnmatchedUnits(left[some], target[nearest[some]], read[some])


def reference_of(reference: Any, n_members: int) -> int | None:
    """Return the number of the reference member, or None for the mean."""
    if reference == "mean":
        return None
    if not isinstance(reference, int) or reference not in range(n_members):
        raise OptionError(
            f"reference must be 0 to {n_members - 1} or 'mean', got {reference!r}",
            how="pass reference= with the number of a member, counted from 0",
        )
    return int(reference)


def frame_of(graph: CouplingGraph, n_members: int, reference: Reference, context: Context) -> int:
    """Return the number of the member whose units are the common frame."""
    first = reference_of(reference, n_members) or 0
    missing = sorted(graph.lacking(context.absent, first))
    if missing:
        deepest = [m for m in range(n_members) if not graph.lacking(context.absent, m)]
        raise OptionError(
            f"members cannot be aligned to member {first}",
            where=f"group {missing[0]}",
            why="it lacks this block, so the units of other members have no counterpart",
            how=f"pass reference={deepest[0]}" if deepest else "use method='transplant'",
        )
    return first


def present(graph: CouplingGraph, context: Context, member: int, orders: Orders) -> Orders:
    """Return the orders of a member that stand for nothing in the blocks that it lacks."""
    missing = graph.lacking(context.absent, member)
    return {k: np.full_like(o, -1) if k in missing else o for k, o in orders.items()}


def common_orders(
    graph: CouplingGraph,
    features: Callable[[int], Features],
    n: int,
    reference: Reference,
    context: Context,
    align: Align,
    reorder: Reorder,
) -> list[Orders]:
    """Find the orders of every member.

    With reference "mean" (MergeMany in "Git Re-Basin", arXiv:2209.04836), members are first aligned
    to member 0, and then each to the mean of the others, in turn, until nothing moves. `features`
    are what a member is compared by; they are asked for again rather than held for all members.
    """
    first = frame_of(graph, n, reference, context)
    target, frame = features(first), graph.of_member(first)

    def aligned(member: int, to: Features, start: Orders | None) -> Orders:
        return present(graph, context, member, align(to, member, start))

    orders = [
        identity_orders(frame, frame) if i == first else aligned(i, target, None) for i in range(n)
    ]
    for _ in range(_ROUNDS if reference_of(reference, n) is None else 0):
        changed = False
        for i in range(n):
            mean = _mean(graph, features, orders, i, reorder)
            found = aligned(i, mean, orders[i])
            changed |= any(not np.array_equal(found[k], orders[i][k]) for k in found)
            orders[i] = found
        if not changed:
            break
    return orders


def _mean(
    graph: CouplingGraph,
    features: Callable[[int], Features],
    orders: Sequence[Orders],
    without: int,
    reorder: Reorder,
) -> Features:
    """Return the mean of all members but one, in the common frame, of those that have a unit."""
    others = [j for j in range(len(orders)) if j != without]
    mean: dict[str, Matrix] = {}
    count: dict[str, Matrix] = {}
    for j in others:
        found = features(j)
        for name, matrix in reorder(found, j, orders[j]).items():
            # Where all members have all units, that is known beforehand.
            mean[name] = mean.get(name, 0.0) + (matrix if graph.members else matrix / len(others))
        if graph.members:
            ones = {name: np.ones_like(matrix) for name, matrix in found.items()}
            for name, matrix in reorder(ones, j, orders[j]).items():
                count[name] = count.get(name, 0.0) + matrix
    return {name: m / np.maximum(count[name], 1.0) if count else m for name, m in mean.items()}


def averaged(
    frame: CouplingGraph,
    orders: Sequence[Orders],
    surplus: Sequence[Mapping[str, UnmatchedUnits]] = (),
) -> tuple[UnitMap, ...]:
    """Let M take the mean of the units that stand for a fused one, and U return it to each.

    With members of one width M = permutations / N and U = permutationsᵀ. `surplus` is what is only
    read, for each member by group.
    """
    n, maps = len(orders), []
    for group in frame.groups:
        each = [order[group.name] for order in orders]
        standing = [np.flatnonzero(order >= 0) for order in each]
        target = np.concatenate(standing)
        member = np.repeat(np.arange(n), [len(s) for s in standing])
        unit = np.concatenate([order[s] for order, s in zip(each, standing, strict=True)])
        count = np.bincount(target, minlength=group.n_units)
        weight: Weights | float = 1.0 / n if (count == n).all() else 1.0 / count[target]
        read: Weights | float = 1.0
        rest = [found[group.name] for found in surplus]
        more = [len(s.unit) for s in rest]
        if sum(more):
            weight = np.r_[np.broadcast_to(weight, target.shape), np.zeros(sum(more))]
            read = np.concatenate([np.ones(len(target)), *(s.read for s in rest)])
            target = np.concatenate([target, *(s.target for s in rest)])
            member = np.r_[member, np.repeat(np.arange(n), more)]
            unit = np.concatenate([unit, *(s.unit for s in rest)])
        maps.append(UnitMap(group.name, group.n_units, target, member, unit, weight, read))
    return tuple(maps)
