"""Alignment by permutations: members against a reference, or each against the mean of the others.

Every member gets one permutation to a common frame, so the permutation from one member to another
is the way through that frame, and going round a cycle of members is the identity.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment

from fxfuse.calibrated import Matrix
from fxfuse.coupling import CouplingGraph, Index
from fxfuse.errors import ControlError
from fxfuse.options import Options
from fxfuse.plan import UnitMap

#: For each group, which unit of a member stands for each unit of the common frame, int64 [n].
Orders = dict[str, Index]

#: What members are compared by: matrices by the name of a tensor or of a group.
Features = Mapping[str, Matrix]

#: Aligns the features of a member (second) to a target (first), starting from orders if there are.
Align = Callable[[Features, Features, Orders | None], Orders]

#: Features of a member with its units in other orders.
Reorder = Callable[[Features, Orders], Features]

#: A gain smaller than this, relative to the similarities, is rounding.
_GAIN = 1e-9
_ROUNDS = 20


def identity_orders(graph: CouplingGraph) -> Orders:
    """Every unit in its place."""
    return {group.name: np.arange(group.n_units) for group in graph.groups}


def best_order(similarity: Matrix, held: Index | None = None) -> Index:
    """The assignment of largest total similarity.

    Args:
        similarity: Of each unit of the target (rows) and of the member (columns), [n, n].
        held: An assignment that is kept unless another one is truly better: ties and rounding would
            make a descent cycle.
    """
    best: Index = linear_sum_assignment(similarity, maximize=True)[1]
    if held is None:
        return best
    each = np.arange(len(best))
    gain = similarity[each, best].sum() - similarity[each, held].sum()
    return best if gain > _GAIN * np.abs(similarity).sum() / max(len(best), 1) else held


def reference_of(options: Options, n_members: int) -> int | None:
    """The number of the reference member, or None for the mean.

    Raises:
        ControlError: There is no such member.
    """
    reference = options.reference
    if reference == "mean":
        return None
    if reference not in range(n_members):
        raise ControlError(
            f"there is no reference member {reference!r}",
            why=f"the {n_members} members are counted from 0",
            how='pass reference= with the number of a member, or "mean"',
        )
    return reference


def common_orders(
    graph: CouplingGraph,
    features: Sequence[Features],
    options: Options,
    align: Align,
    reorder: Reorder,
) -> list[Orders]:
    """The orders of every member.

    With reference "mean" (MergeMany in "Git Re-Basin", arXiv:2209.04836), members are first aligned
    to member 0, and then each to the mean of the others, in turn, until nothing moves.

    Raises:
        ControlError: There is no such reference member.
    """
    n, reference = len(features), reference_of(options, len(features))
    first = reference or 0
    orders = [
        identity_orders(graph) if i == first else align(features[first], features[i], None)
        for i in range(n)
    ]
    for _ in range(_ROUNDS if reference is None else 0):
        changed = False
        for i in range(n):
            others = [reorder(features[j], orders[j]) for j in range(n) if j != i]
            mean = {name: np.mean([f[name] for f in others], axis=0) for name in others[0]}
            found = align(mean, features[i], orders[i])
            changed |= any(not np.array_equal(found[k], orders[i][k]) for k in found)
            orders[i] = found
        if not changed:
            break
    return orders


def averaged(graph: CouplingGraph, orders: Sequence[Orders]) -> tuple[UnitMap, ...]:
    """M = permutations / N, U = permutationsᵀ."""
    n = len(orders)
    return tuple(
        UnitMap(
            group.name,
            group.n_units,
            np.tile(np.arange(group.n_units), n),
            np.repeat(np.arange(n), group.n_units),
            np.concatenate([order[group.name] for order in orders]),
            1.0 / n,
        )
        for group in graph.groups
    )
