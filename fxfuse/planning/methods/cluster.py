"""Neuron interpolation: units of all members are clustered, and each cluster becomes one unit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fxfuse.analysis.coupling import CouplingGraph, Index
from fxfuse.planning.context import Context, State
from fxfuse.planning.measured import Matrix, matrix_of, require_activations
from fxfuse.planning.methods.registry import Method, method
from fxfuse.planning.plan import UnitMap, Weights
from fxfuse.planning.scores import check_score, score_units

_ROUNDS = 100


@method("cluster")
@dataclass(frozen=True)
class Cluster(Method):
    """Clusters units by their activations with k-means, weighted by importance.

    The fused unit of a cluster is the weighted mean of its units, and is read off as each of them.
    With a refit, the next layer is regressed on the fused network's own inputs: "K-means Fusion,
    linear" of Luenam et al., "Model Fusion via Neuron Interpolation", arXiv:2507.00037. The start
    is not random: it is the units of greatest weight, each far from those before it.

    Attributes:
        score: Importance of a unit, as in `Transplant`. None: all units count alike.
    """

    score: str | None = None
    any_size: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the score, too."""
        super().__post_init__()
        if self.score is not None:
            check_score(self.score)

    def maps(
        self, graph: CouplingGraph, states: Sequence[State], context: Context
    ) -> tuple[UnitMap, ...]:
        """Make the maps."""
        activations = require_activations(graph, states, context, "method 'cluster'")
        every = {
            member: {g.name: np.arange(graph.units_of(g.name, member)) for g in graph.groups}
            for member in range(len(states))
        }
        scores = score_units(graph, states, self.score, context, every) if self.score else None
        maps = []
        for group in graph.groups:
            units = [every[member][group.name] for member in range(len(states))]
            member, unit = np.repeat(range(len(units)), [*map(len, units)]), np.concatenate(units)
            weights = np.ones(len(unit))
            if scores is not None:
                found = [scores[m][group.name] for m in range(len(units))]
                weights = np.concatenate(found).clip(min=0.0)
            points = np.concatenate([matrix_of(t) for t in activations[group.name]], axis=1)
            target, share = clusters(points, weights, context.size_of(group))
            maps.append(UnitMap(group.name, int(target.max()) + 1, target, member, unit, share))
        return tuple(maps)


def clusters(points: Matrix, weights: Weights, count: int) -> tuple[Index, Weights]:
    """Cluster units so that each is near the mean of its cluster (Lloyd's algorithm).

    Args:
        points: What each unit answers to each input, float64 [rows, m].
        weights: How much each unit counts, not negative, float64 [m].
        count: How many clusters there are, at most m.

    Returns:
        The cluster of each unit, int64 [m], in the order of their first units; and its share of
        the cluster's mean, float64 [m].
    """
    # Of points only their products count: m times m numbers, however many inputs there are.
    products = points.T @ points
    means = np.zeros((len(weights), count))
    means[_spread(products, weights, count), np.arange(count)] = 1.0
    cluster = _nearest(products, means)
    for _ in range(_ROUNDS):
        before = cluster
        means = np.zeros_like(means)
        means[np.arange(len(cluster)), cluster] = _shares(cluster, weights)
        cluster = _nearest(products, means)
        if np.array_equal(cluster, before):
            break
    first = np.unique(cluster, return_index=True)[1]
    number = np.empty(count, dtype=np.int64)
    number[cluster[np.sort(first)]] = np.arange(len(first))
    return number[cluster], _shares(cluster, weights)


def _spread(products: Matrix, weights: Weights, count: int) -> Index:
    """Choose units to start from, each time the one that costs most as it is, int64 [count]."""
    own = np.diagonal(products)
    chosen = [int(np.argmax(weights * own))]
    distance = _distances(products, chosen[0])
    for _ in range(count - 1):
        cost = np.maximum(weights, 1e-9 * weights.max(initial=1.0)) * distance
        cost[chosen] = -1.0
        chosen.append(int(np.argmax(cost)))
        distance = np.minimum(distance, _distances(products, chosen[-1]))
    return np.array(chosen)


def _distances(products: Matrix, unit: int) -> Weights:
    own = np.diagonal(products)
    found: Weights = (own - 2 * products[unit] + own[unit]).clip(min=0.0)
    return found


def _nearest(products: Matrix, means: Matrix) -> Index:
    """Return the nearest of some means of units, [m, count], for each unit; none stays empty."""
    across = products @ means
    far = np.einsum("mk,mk->k", means, across) - 2 * across
    cluster: Index = far.argmin(axis=1)
    size = np.bincount(cluster, minlength=far.shape[1])
    for empty in np.flatnonzero(size == 0):
        cost = far[np.arange(len(far)), cluster] + np.diagonal(products)
        taken = int(np.where(size[cluster] > 1, cost, -np.inf).argmax())
        size[cluster[taken]] -= 1
        cluster[taken], size[empty] = empty, 1
    return cluster


def _shares(cluster: Index, weights: Weights) -> Weights:
    """Return each unit's share of its cluster; alike where nothing in a cluster counts."""
    total = np.bincount(cluster, weights)
    counts = np.where(total[cluster] > 0, weights, 1.0)
    shares: Weights = counts / np.bincount(cluster, counts)[cluster]
    return shares
