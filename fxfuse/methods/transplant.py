"""Neuron Transplantation: concatenate the members, keep the most important units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from fxfuse.coupling import CouplingGraph, Index
from fxfuse.errors import UnknownMethodError
from fxfuse.methods.registry import Options, State, method
from fxfuse.plan import UnitMap
from fxfuse.scores import check_score, magnitude

#: For each group: (member, unit) of every unit that is kept, sorted, int64 [n, 2].
Kept = dict[str, Index]

VARIANTS = ("iterative", "hierarchical")


@method("transplant")
def transplant(
    graph: CouplingGraph, states: Sequence[State], options: Options
) -> tuple[UnitMap, ...]:
    """One-hot maps (Öz et al., "Model Fusion via Neuron Transplantation", arXiv:2502.06849).

    Variants: None fuses all members at once; `iterative` fuses the first two, then the result with
    the next member, and so on; `hierarchical` fuses pairs, then pairs of the results.

    Raises:
        UnknownScoreError: The score is unknown.
        UnknownMethodError: The variant is unknown.
    """
    degree = check_score(options.score)
    leaves = [_whole(graph, i) for i in range(len(states))]
    if options.variant is None:
        kept = _select(graph, states, leaves, degree)
    elif options.variant == "iterative":
        kept = leaves[0]
        for leaf in leaves[1:]:
            kept = _select(graph, states, [kept, leaf], degree)
    elif options.variant == "hierarchical":
        while len(leaves) > 1:
            pairs = [leaves[i : i + 2] for i in range(0, len(leaves), 2)]
            leaves = [
                _select(graph, states, pair, degree) if len(pair) > 1 else pair[0] for pair in pairs
            ]
        kept = leaves[0]
    else:
        raise UnknownMethodError(
            f"unknown variant {options.variant!r} of transplant",
            how=f"use one of {', '.join(VARIANTS)}, or None to fuse all members at once",
        )
    return tuple(
        UnitMap(
            group.name,
            group.n_units,
            np.arange(group.n_units),
            kept[group.name][:, 0],
            kept[group.name][:, 1],
        )
        for group in graph.groups
    )


def _whole(graph: CouplingGraph, member: int) -> Kept:
    return {
        g.name: np.stack([np.full(g.n_units, member), np.arange(g.n_units)], axis=1)
        for g in graph.groups
    }


def _select(
    graph: CouplingGraph, states: Sequence[State], parts: Sequence[Kept], degree: int
) -> Kept:
    """Keeps the best units of several (fused) networks, as many as one network has."""
    pool = {g.name: np.concatenate([part[g.name] for part in parts]) for g in graph.groups}
    involved = sorted({int(m) for rows in pool.values() for m in rows[:, 0]})
    scores = {}
    for member in involved:
        alive: Mapping[str, Index] = {
            name: rows[rows[:, 0] == member][:, 1] for name, rows in pool.items()
        }
        scores[member] = magnitude(
            graph, states[member], degree, n_members=len(involved), kept=alive
        )
    kept = {}
    for group in graph.groups:
        rows = pool[group.name]
        values = np.array([scores[int(m)][group.name][u] for m, u in rows])
        # Stable: of equal scores the earlier member's unit stays.
        best = np.argsort(-values, kind="stable")[: group.n_units]
        chosen = rows[best]
        kept[group.name] = chosen[np.lexsort((chosen[:, 1], chosen[:, 0]))]
    return kept
