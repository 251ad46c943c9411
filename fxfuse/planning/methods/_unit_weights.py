"""What the units of a group own in the weights, as rows that can be compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import nn

from fxfuse.analysis.coupling import CouplingGraph, CouplingGroup, Index, Place
from fxfuse.planning.context import State
from fxfuse.planning.measured import Matrix, matrix_of
from fxfuse.planning.roles import is_written

#: Tensors in float64 by canonical name.
Tensors = Mapping[str, Matrix]

#: Moves the units of a group at a place: rows [n_units, *] of a member → rows of the frame's units.
Move = Callable[[CouplingGroup, Place, Matrix], Matrix]


def real_tensors(graph: CouplingGraph, state: State) -> dict[str, Matrix]:
    """All tensors that groups own, in float64; complex ones get a last dimension of size 2."""
    names = sorted({graph.program.canonical[name] for g in graph.groups for name, _ in g.index})
    return {name: _real(state[name]) for name in names}


def _real(tensor: torch.Tensor) -> Matrix:
    return matrix_of(torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor)


def own_places(graph: CouplingGraph, group: CouplingGroup) -> dict[Place, Index]:
    """Return the slots of a group's units, each tied tensor once: indices [n_units, slots]."""
    canonical = graph.program.canonical
    return {place: rows for place, rows in group.index.items() if canonical[place[0]] == place[0]}


def units_of(weight: Matrix, dim: int, rows: Index) -> Matrix:
    """Return everything that each unit owns in a tensor, [n_units, *]."""
    taken: Matrix = np.moveaxis(weight, dim, 0)[rows.reshape(-1)]
    return taken.reshape(len(rows), -1)


def moved(
    graph: CouplingGraph,
    name: str,
    weight: Matrix,
    move: Move,
    *,
    frame: CouplingGraph | None = None,
    skip: int | None = None,
) -> Matrix:
    """Move the units of every group of a tensor, along every dimension but `skip`.

    `frame` is the analysis of the network to whose units they are moved, where that is another one.
    """
    frame = frame or graph
    for dim in range(weight.ndim):
        place = (name, dim)
        groups = graph.group_of.get(place, ()) if dim != skip else ()
        if not groups:
            continue
        front = np.moveaxis(weight, dim, 0)
        size = frame.program.tensor(name).shape[dim]
        changed = np.empty((size, *front.shape[1:]))
        changed[_rest(frame, place)] = front[_rest(graph, place)]
        for group in groups:
            rows, to = group.index[place], frame.rows_of(group.name, place)
            owned = front[rows.reshape(-1)].reshape(len(rows), -1)
            found = move(group, place, owned)
            changed[to.reshape(-1)] = found.reshape(to.size, *front.shape[1:])
        weight = np.moveaxis(changed, 0, dim)
    return weight


def _rest(graph: CouplingGraph, place: Place) -> Index:
    """Return the indices of a place that no group owns."""
    size = graph.program.tensor(place[0]).shape[place[1]]
    owned = [group.index[place].reshape(-1) for group in graph.group_of.get(place, ())]
    return np.setdiff1d(np.arange(size), np.concatenate([np.empty(0, np.int64), *owned]))


def writing_places(graph: CouplingGraph, group: CouplingGroup) -> list[Place]:
    """Return the slots of a group's units in the parameters that write them."""
    return [
        place
        for place in own_places(graph, group)
        if isinstance(graph.program.tensor(place[0]), nn.Parameter) and is_written(graph, place)
    ]


def written(graph: CouplingGraph, group: CouplingGroup, tensors: Tensors) -> Matrix:
    """Return the parameters that write each unit of a member, [n_units, k]."""
    parts = [
        units_of(tensors[name], dim, group.index[(name, dim)])
        for name, dim in writing_places(graph, group)
    ]
    return np.concatenate([np.empty((group.n_units, 0)), *parts], axis=1)


def statistics(graph: CouplingGraph, group: CouplingGroup, tensors: Tensors) -> Matrix:
    """Return statistics of each unit that no permutation of other groups changes, [n_units, k]."""
    columns = []
    for (name, dim), rows in own_places(graph, group).items():
        own = units_of(tensors[name], dim, rows)
        columns += [own.sum(1), (own**2).sum(1), np.abs(own).sum(1), np.abs(own).max(1)]
    return np.stack(columns, axis=1)


def statistics_distance(
    frame: CouplingGraph, graph: CouplingGraph, group: str, ours: Tensors, theirs: Tensors
) -> Matrix:
    """Squared distance of the statistics of the units of two members, each relative, [n, m]."""
    first, second = (
        statistics(g, next(x for x in g.groups if x.name == group), tensors)
        for g, tensors in ((frame, ours), (graph, theirs))
    )
    scale = np.maximum(np.abs(first).max(axis=0), 1e-12)
    distance: Matrix = (((first[:, None] - second[None]) / scale) ** 2).sum(axis=2)
    return distance
