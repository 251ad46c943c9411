"""Partial fusion: the most similar units of the members merge, the others stay side by side."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fxfuse.analysis.coupling import CouplingGraph
from fxfuse.planning.context import Context, State
from fxfuse.planning.measured import matrix_of, require_activations
from fxfuse.planning.methods._clusters import Clusters
from fxfuse.planning.methods.registry import Method, method
from fxfuse.planning.plan import UnitMap


@method("partial")
@dataclass(frozen=True)
class Partial(Method):
    """Matches as many units of different members as the size asks for; the others stay as they are.

    Morelli and Eckstein, "Partial Fusion of Neural Networks", arXiv:2605.22350: which units are
    matched, and to which, is one partial assignment, by the correlation over the calibration
    inputs. At width 1 every unit has a partner, at width N none; the width may differ from layer to
    layer. Members are matched one after the other to what the ones before them became, and
    each gives the same share of its units. Below width 1, units that were matched merge further,
    the most correlated pair first.

    For a cluster of s units, M is 1/s and U is 1 for each of them, the pseudo-inverse. With a
    refit, and `Size(allocation="auto")` for the layers' budgets, this is the method of Nasery et
    al., "PLeaS: Merging Models with Permutations and Least Squares", arXiv:2407.02447.
    """

    any_size: ClassVar[bool] = True

    def maps(
        self, graph: CouplingGraph, states: Sequence[State], context: Context
    ) -> tuple[UnitMap, ...]:
        """Make the maps."""
        activations = require_activations(graph, states, context, "method 'partial'")
        maps = []
        for group in graph.groups:
            each = [matrix_of(tensor) for tensor in activations[group.name]]
            counts = [a.shape[1] for a in each]
            member = np.repeat(np.arange(len(counts)), counts)
            unit = np.concatenate([np.arange(count) for count in counts])
            clusters = Clusters(np.concatenate(each, axis=1), member)
            merges, done = len(unit) - context.size_of(group), 0
            ends = np.cumsum(counts)
            for start, end in itertools.pairwise(ends):
                share = (end - ends[0]) / (ends[-1] - ends[0])
                pairs = int(np.floor(merges * share + 0.5)) - done
                done += clusters.match_best(np.arange(start), np.arange(start, end), pairs)
            clusters.merge(merges - done)
            target = clusters.numbers()
            size = np.bincount(target)
            maps.append(UnitMap(group.name, len(size), target, member, unit, 1.0 / size[target]))
        return tuple(maps)
