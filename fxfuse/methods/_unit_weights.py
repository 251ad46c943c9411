"""What the units of a group own in the weights, as rows that can be compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch

from fxfuse.calibrated import Matrix
from fxfuse.coupling import CouplingGraph, CouplingGroup, Index, Place
from fxfuse.options import State

#: Tensors in float64 by canonical name.
Tensors = Mapping[str, Matrix]

#: Moves the units of a group: rows [n_units, *] of a member → rows of the reference's units.
Move = Callable[[CouplingGroup, Matrix], Matrix]


def real_tensors(graph: CouplingGraph, state: State) -> dict[str, Matrix]:
    """All tensors that groups own, in float64; complex ones get a last dimension of size 2."""
    names = sorted({graph.captured.canonical[name] for g in graph.groups for name, _ in g.index})
    return {name: _real(state[name]) for name in names}


def _real(tensor: torch.Tensor) -> Matrix:
    pairs = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
    return pairs.to("cpu", torch.float64).numpy()


def own_places(graph: CouplingGraph, group: CouplingGroup) -> dict[Place, Index]:
    """The slots of a group's units, each tied tensor once: indices [n_units, slots]."""
    canonical = graph.captured.canonical
    return {place: rows for place, rows in group.index.items() if canonical[place[0]] == place[0]}


def units_of(weight: Matrix, dim: int, rows: Index) -> Matrix:
    """Everything that each unit owns in a tensor, [n_units, *]."""
    taken: Matrix = np.moveaxis(weight, dim, 0)[rows.reshape(-1)]
    return taken.reshape(len(rows), -1)


def moved(
    graph: CouplingGraph, name: str, weight: Matrix, move: Move, *, skip: int | None = None
) -> Matrix:
    """A tensor with the units of every group moved, along every dimension but one.

    Args:
        graph: The analysis of the members.
        name: Canonical name of the tensor.
        weight: The tensor.
        move: What becomes of the units of a group.
        skip: The dimension that stays as it is.
    """
    for dim in range(weight.ndim):
        for group in graph.group_of.get((name, dim), ()) if dim != skip else ():
            rows = group.index[(name, dim)]
            front = np.moveaxis(weight, dim, 0)
            owned = front[rows.reshape(-1)].reshape(len(rows), -1)
            changed = front.copy()
            changed[rows.reshape(-1)] = move(group, owned).reshape(rows.size, *front.shape[1:])
            weight = np.moveaxis(changed, 0, dim)
    return weight


def statistics(graph: CouplingGraph, group: CouplingGroup, tensors: Tensors) -> Matrix:
    """Statistics of each unit that no permutation of other groups changes, [n_units, k]."""
    columns = []
    for (name, dim), rows in own_places(graph, group).items():
        own = units_of(tensors[name], dim, rows)
        columns += [own.sum(1), (own**2).sum(1), np.abs(own).sum(1), np.abs(own).max(1)]
    return np.stack(columns, axis=1)


def statistics_distance(
    graph: CouplingGraph, group: CouplingGroup, a: Tensors, b: Tensors
) -> Matrix:
    """Squared distance of the statistics of the units of two members, each relative, [n, n]."""
    ours, theirs = statistics(graph, group, a), statistics(graph, group, b)
    scale = np.maximum(np.abs(ours).max(axis=0), 1e-12)
    distance: Matrix = (((ours[:, None] - theirs[None]) / scale) ** 2).sum(axis=2)
    return distance
