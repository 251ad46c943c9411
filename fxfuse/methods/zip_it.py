"""Feature zipping (ZipIt!): the most correlated units merge, within and across members."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fxfuse.calibrated import Matrix, matrix_of, require_activations
from fxfuse.coupling import CouplingGraph, CouplingGroup
from fxfuse.methods._clusters import Clusters
from fxfuse.methods.registry import check_variant, method
from fxfuse.options import Options, State
from fxfuse.plan import UnitMap

VARIANTS = ("across",)


@method("zip")
def zip_it(graph: CouplingGraph, states: Sequence[State], options: Options) -> tuple[UnitMap, ...]:
    """Merges the most correlated pair of units until as many are left as a member has.

    Stoica et al., "ZipIt! Merging Models from Different Tasks without Training", arXiv:2305.03053:
    greedy, on the correlation over the calibration inputs, in which a merged unit is the mean of
    its units. For a cluster of s units, M is 1/s and U is 1 for each of them, the pseudo-inverse.

    Variants: None merges any two units; `across` never merges two units of one member (one member
    after the other is matched to the clusters so far, as a free order can get stuck).

    Raises:
        CalibrationError: There are no activations, or they do not fit.
        UnknownMethodError: The variant is unknown.
    """
    check_variant("zip", options, VARIANTS)
    activations = require_activations(graph, states, options, "method 'zip'")
    return tuple(
        _zipped(group, [matrix_of(t) for t in activations[group.name]], options)
        for group in graph.groups
    )


def _zipped(group: CouplingGroup, activations: Sequence[Matrix], options: Options) -> UnitMap:
    n, n_members = group.n_units, len(activations)
    clusters = Clusters(np.concatenate(activations, axis=1), np.repeat(np.arange(n_members), n))
    if options.variant == "across":
        for member in range(1, n_members):
            clusters.match(np.arange(n * member), np.arange(n) + n * member)
    else:
        clusters.merge(n * (n_members - 1))
    target = clusters.numbers()
    size = np.bincount(target, minlength=n)
    each = np.arange(n * n_members)
    return UnitMap(group.name, n, target, each // n, each % n, 1.0 / size[target])
