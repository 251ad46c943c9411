"""Feature zipping (ZipIt!): the most correlated units merge, within and across members."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from fxfuse.analysis.coupling import CouplingGraph
from fxfuse.errors import OptionError
from fxfuse.planning.context import Context, State
from fxfuse.planning.measured import Matrix, matrix_of, require_activations
from fxfuse.planning.methods._clusters import Clusters
from fxfuse.planning.methods.registry import Method, method
from fxfuse.planning.plan import UnitMap


@method("zip")
@dataclass(frozen=True)
class Zip(Method):
    """Merges the most correlated pair of units until as many are left as a member has.

    Stoica et al., "ZipIt! Merging Models from Different Tasks without Training", arXiv:2305.03053:
    greedy, on the correlation over the calibration inputs, in which a merged unit is the mean of
    its units. For a cluster of s units, M is 1/s and U is 1 for each of them, the pseudo-inverse.

    Variants: None merges any two units; `across` never merges two units of one member (one member
    after the other is matched to the clusters so far, as a free order can get stuck).

    Any other size than a member's, and members of different widths, are merged to as they are; a
    unit that answers 0 to all inputs is left out then. With `across` each group is as large as in
    the widest member.

    Attributes:
        variant: `across` never merges two units of one member; None merges any two.
    """

    variant: Literal["across"] | None = None
    any_size: ClassVar[bool] = True

    def maps(
        self, graph: CouplingGraph, states: Sequence[State], context: Context
    ) -> tuple[UnitMap, ...]:
        """Make the maps."""
        activations = require_activations(graph, states, context, "method 'zip'")
        sizes = {group.name: context.size_of(group) for group in graph.groups}
        resized = bool(graph.members) or any(sizes[g.name] != g.n_units for g in graph.groups)
        if self.variant == "across" and context.sizes is not None and resized:
            raise OptionError(
                "variant 'across' of zip has no width",
                why="it never merges two units of one member, so the members decide its size",
                how="leave the width out, or the variant",
            )
        return tuple(
            _zipped(
                name,
                [matrix_of(t) for t in activations[name]],
                None if self.variant == "across" else size,
                resized=resized,
            )
            for name, size in sizes.items()
        )


def _zipped(
    name: str, activations: Sequence[Matrix], size: int | None, *, resized: bool
) -> UnitMap:
    """Return the map of a group; of no given size, units of one member stay apart."""
    units = [np.arange(a.shape[1]) for a in activations]
    if resized:
        alive = [np.flatnonzero((a != 0).any(axis=0)) for a in activations]
        least = max(map(len, units)) if size is None else size
        if sum(map(len, alive)) >= least:
            units = alive
    counts = [len(u) for u in units]
    member, unit = np.repeat(np.arange(len(units)), counts), np.concatenate(units)
    taken = [a[:, u] for a, u in zip(activations, units, strict=True)]
    clusters = Clusters(np.concatenate(taken, axis=1), member)
    if size is None:
        ends = np.cumsum(counts)
        for number in range(1, len(units)):
            clusters.match(np.arange(ends[number - 1]), np.arange(ends[number - 1], ends[number]))
    else:
        clusters.merge(len(unit) - size)
    target = clusters.numbers()
    n_fused = int(target.max()) + 1
    count = np.bincount(target, minlength=n_fused)
    return UnitMap(name, n_fused, target, member, unit, 1.0 / count[target])
