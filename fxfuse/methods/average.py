"""Averaging after alignment by weight matching."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from fxfuse.coupling import CouplingGraph, Index
from fxfuse.methods.registry import Options, State, method
from fxfuse.plan import UnitMap

_SWEEPS = 20

Matrix = NDArray[np.float64]


@method("average")
def average(graph: CouplingGraph, states: Sequence[State], options: Options) -> tuple[UnitMap, ...]:
    """Permutes the units of every member to those of member 0, then averages.

    Weight matching by coordinate descent (Ainsworth et al., "Git Re-Basin", arXiv:2209.04836,
    section 3.2), started from a matching of permutation-invariant statistics of each unit, which
    is exact for a permuted copy.
    """
    n = len(states)
    orders = [{g.name: np.arange(g.n_units) for g in graph.groups}]
    orders += [align(graph, states[0], state) for state in states[1:]]
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


def align(graph: CouplingGraph, reference: State, other: State) -> dict[str, Index]:
    """For each group, which unit of `other` corresponds to each unit of `reference`.

    Returns:
        For each group, int64 [n_units].
    """
    names = sorted({graph.captured.canonical[name] for g in graph.groups for name, _ in g.index})
    ours = {name: _real(reference[name]) for name in names}
    theirs = {name: _real(other[name]) for name in names}
    order = {}
    for group in graph.groups:
        a, b = _statistics(graph, group.index, ours), _statistics(graph, group.index, theirs)
        scale = np.maximum(np.abs(a).max(axis=0), 1e-12)
        distance = ((a[:, None] - b[None]) / scale) ** 2
        order[group.name] = linear_sum_assignment(distance.sum(axis=2))[1]
    for _ in range(_SWEEPS):
        changed = False
        for group in graph.groups:
            similarity = np.zeros((group.n_units, group.n_units))
            for (name, dim), rows in group.index.items():
                if graph.captured.canonical[name] == name:
                    moved = _reordered(graph, name, theirs[name], order, skip=dim)
                    similarity += _units(ours[name], dim, rows) @ _units(moved, dim, rows).T
            best = linear_sum_assignment(similarity, maximize=True)[1]
            held = order[group.name]
            # Only a real gain counts: ties and rounding would make the descent cycle.
            each = np.arange(group.n_units)
            gain = similarity[each, best].sum() - similarity[each, held].sum()
            if gain > 1e-9 * np.abs(similarity).sum() / max(group.n_units, 1):
                order[group.name] = best
                changed = True
        if not changed:
            break
    return order


def _real(tensor: torch.Tensor) -> Matrix:
    """A tensor in float64; a complex one gets a last dimension with real and imaginary parts."""
    pairs = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
    return pairs.to("cpu", torch.float64).numpy()


def _units(weight: Matrix, dim: int, rows: Index) -> Matrix:
    """Everything that each unit owns in a tensor, [n_units, *]."""
    taken: Matrix = np.moveaxis(weight, dim, 0)[rows.reshape(-1)]
    return taken.reshape(len(rows), -1)


def _reordered(
    graph: CouplingGraph, name: str, weight: Matrix, order: Mapping[str, Index], *, skip: int
) -> Matrix:
    for dim in range(weight.ndim):
        if dim == skip:
            continue
        for group in graph.group_of.get((name, dim), ()):
            rows = group.index[(name, dim)]
            source = np.arange(weight.shape[dim])
            source[rows.reshape(-1)] = rows[order[group.name]].reshape(-1)
            weight = np.take(weight, source, axis=dim)
    return weight


def _statistics(
    graph: CouplingGraph, index: Mapping[tuple[str, int], Index], state: Mapping[str, Matrix]
) -> Matrix:
    """Statistics of each unit that no permutation of other groups changes, [n_units, k]."""
    columns = []
    for (name, dim), rows in index.items():
        if graph.captured.canonical[name] == name:
            own = _units(state[name], dim, rows)
            columns += [own.sum(1), (own**2).sum(1), np.abs(own).sum(1), np.abs(own).max(1)]
    return np.stack(columns, axis=1)
