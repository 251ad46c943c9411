"""Greedy clustering of units by the correlation of the clusters' mean activations."""

from __future__ import annotations

import numpy as np
from scipy.optimize import linear_sum_assignment

from fxfuse.analysis.coupling import Index
from fxfuse.planning.measured import Matrix
from fxfuse.planning.methods._correlation import centred


class Clusters:
    """Clusters of units, each known by its first unit.

    The covariance of means is known exactly from that of their units, so no activation is looked
    at twice. The best partner of every cluster is remembered: a merge costs a few rows of the
    covariance, not all of it.

    Args:
        activations: float64 [rows, m]: all units of all members.
        member: int64 [m]: whose each unit is.
    """

    def __init__(self, activations: Matrix, member: Index) -> None:
        columns = centred(activations)
        self._covariance: Matrix = columns.T @ columns
        self._size = np.ones(len(member))
        self._alive = np.ones(len(member), dtype=bool)
        self._cluster = np.arange(len(member))
        #: Which members have units in each cluster, bool [m, N].
        self._members = member[:, None] == np.arange(int(member.max()) + 1)

    def numbers(self) -> Index:
        """Return the cluster of each unit, int64 [m], counted in the order of their first units."""
        number: Index = np.unique(self._cluster, return_inverse=True)[1]
        return number

    def merge(self, times: int) -> None:
        """Merge the most correlated pair of clusters, several times."""
        every = np.arange(len(self._alive))
        self._merge(times, every, every)

    def match(self, first: Index, second: Index) -> None:
        """Merge clusters of two sides one to one, the most correlated pair first.

        Args:
            first: First units of the clusters of one side, int64 [k]; what is no cluster any more
                is passed over.
            second: The same for the other side.
        """
        pairs = int(min(self._alive[first].sum(), self._alive[second].sum()))
        self._merge(pairs, first, second)

    def match_best(self, first: Index, second: Index, pairs: int) -> int:
        """Merge pairs of clusters of two sides so that their correlations sum to the most.

        Which clusters stay apart is part of the choice: a partial assignment, solved as a whole one
        with as many stand-ins on each side as clusters stay apart on the other.

        Args:
            first: First units of the clusters of one side, int64 [a]; what is no cluster any more
                is passed over.
            second: The same for the other side.
            pairs: How many pairs, if there are as many clusters on each side.

        Returns:
            How many pairs there were.
        """
        a, b = first[self._alive[first]], second[self._alive[second]]
        pairs = min(pairs, len(a), len(b))
        value = np.zeros((len(a) + len(b) - pairs, len(b) + len(a) - pairs))
        value[: len(a), : len(b)] = np.stack([self._correlation(int(i))[b] for i in a])
        # Stand-ins are no partners of each other.
        value[len(a) :, len(b) :] = -4.0 * len(value)
        rows, columns = linear_sum_assignment(value, maximize=True)
        for row, column in zip(rows, columns, strict=True):
            if row < len(a) and column < len(b):
                self._join(*sorted((int(a[row]), int(b[column]))))
        return pairs

    def _merge(self, times: int, first: Index, second: Index) -> None:
        """Merge pairs of one cluster of each side; sides that differ lose what was merged."""
        m = len(self._alive)
        side = np.zeros((2, m), dtype=bool)
        side[0, first] = side[1, second] = True
        side &= self._alive
        once = not np.array_equal(side[0], side[1])
        best, partner = np.full(m, -np.inf), np.zeros(m, dtype=np.int64)

        def look(i: int) -> None:
            allowed = (side[0] & side[1, i]) | (side[1] & side[0, i])
            allowed[i] = False
            row = np.where(allowed, self._correlation(i), -np.inf)
            partner[i] = int(row.argmax())
            best[i] = row[partner[i]]

        for unit in np.flatnonzero(side[0] | side[1]):
            look(int(unit))
        for _ in range(times):
            found = int(best.argmax())
            i, j = sorted((found, int(partner[found])))
            self._join(i, j)
            side[:, j] = False
            if once:
                side[:, i] = False
            active = side[0] | side[1]
            best[~active] = -np.inf
            stale = active & np.isin(partner, (i, j))
            stale[i] = active[i]
            if not once:
                row = self._correlation(i)
                nearer = active & ~stale & (row > best)
                best[nearer], partner[nearer] = row[nearer], i
            for unit in np.flatnonzero(stale):
                look(int(unit))

    def _join(self, i: int, j: int) -> None:
        """Cluster j becomes part of cluster i."""
        a, b = self._size[i], self._size[j]
        covariance = self._covariance
        variance = a**2 * covariance[i, i] + 2 * a * b * covariance[i, j] + b**2 * covariance[j, j]
        row = (a * covariance[i] + b * covariance[j]) / (a + b)
        covariance[i], covariance[:, i] = row, row
        covariance[i, i] = max(variance / (a + b) ** 2, 0.0)
        self._size[i] += self._size[j]
        self._members[i] |= self._members[j]
        self._cluster[self._cluster == j] = i
        self._alive[j] = False

    def _correlation(self, i: int) -> Matrix:
        """Of cluster i with every other, [m].

        A cluster that does not vary correlates with nothing, apart from one of other members that
        does not vary either: so dead units leave the living ones alone.
        """
        variance = np.diagonal(self._covariance)
        scale = np.sqrt(variance * variance[i])
        row: Matrix = self._covariance[i] / np.where(scale, scale, 1.0)
        if not variance[i]:
            strangers = ~(self._members & self._members[i]).any(axis=1)
            row = np.where((variance == 0) & strangers, 1.0, 0.0)
        return row
