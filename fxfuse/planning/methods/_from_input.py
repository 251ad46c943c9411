"""Matching one group after the other, from the input on, by the weights that write its units."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import cdist

from fxfuse.analysis.coupling import CouplingGraph, CouplingGroup, Place
from fxfuse.planning.measured import Matrix
from fxfuse.planning.methods._unit_weights import (
    Move,
    Tensors,
    moved,
    statistics_distance,
    units_of,
    writing_places,
    written,
)

#: For some units, whether.
Mask = NDArray[np.bool_]

#: For each group, M and U of a member: how much of each unit of it (columns) each unit of the frame
#: (rows) is made of, and how much of each of these is handed back to it; float64 [n, m] both.
Carried = Mapping[str, tuple[Matrix, Matrix]]

#: From the distances of the units of a group, [n, m], and what writes the member's, [m, k], to
#: its M and U.
Solve = Callable[[CouplingGroup, Matrix, Matrix], tuple[Matrix, Matrix]]


def carrying(graph: CouplingGraph, found: Carried) -> Move:
    """Move a member's units to the frame's: by U where a tensor reads them, else by M."""

    def move(group: CouplingGroup, place: Place, units: Matrix) -> Matrix:
        merge, unmerge = found[group.name]
        read = (graph.program.canonical[place[0]], place[1]) in graph.readers
        carried: Matrix = (unmerge if read else merge) @ units
        return carried

    return move


def shared(
    frame: CouplingGraph, name: str, weight: Matrix, standing: Mapping[str, Mask], *, skip: int
) -> Matrix:
    """A tensor of the frame with 0 for units, along other dimensions, that a member has none of.

    Args:
        frame: The analysis of the network that it is of.
        name: Canonical name of the tensor.
        weight: The tensor.
        standing: For each group, of which units the member has one, bool [n].
        skip: The dimension along which all units stay.
    """

    def move(group: CouplingGroup, place: Place, units: Matrix) -> Matrix:
        kept: Matrix = units * standing[group.name][:, None]
        return kept

    return moved(frame, name, weight, move, skip=skip)


def from_the_input(
    frame: CouplingGraph, graph: CouplingGraph, ours: Tensors, theirs: Tensors, solve: Solve
) -> Carried:
    """Match the groups of a member one after the other, each along what was matched before it.

    Groups whose writers all come from where units correspond go first: the graph's order is that of
    the tensors' names, which need not be that of the layers. `solve` matches the units of a group
    by their Euclidean distances; it gets the parameters that write the member's units as well.
    """
    found: dict[str, tuple[Matrix, Matrix]] = {}
    waiting = list(graph.groups)
    while waiting:
        group = min(waiting, key=lambda g: _missing(graph, g, found))
        waiting.remove(group)
        features = _written(frame, graph, group, ours, theirs, found)
        if features is None:
            # Nothing that writes this group comes from where units correspond already.
            cost = np.sqrt(statistics_distance(frame, graph, group.name, ours, theirs))
            own = written(graph, group, theirs)
        else:
            cost, own = cdist(*features), features[1]
        found[group.name] = solve(group, cost, own)
    return found


def _missing(graph: CouplingGraph, group: CouplingGroup, found: Carried) -> int:
    """How far a group is from being compared: 0 by all that writes it, 1 by some of it, 2 by none.

    Vectors (biases, scales) do not count where there is more: alone they say too little of a unit.
    """
    known = [_known(graph, place, found) for place in _weights(graph, group)]
    return 0 if all(known) else 1 if any(known) else 2


def _weights(graph: CouplingGraph, group: CouplingGroup) -> list[Place]:
    """Return the parameters of more than one dimension that write a group."""
    places = writing_places(graph, group)
    return [place for place in places if graph.program.tensor(place[0]).dim() > 1]


def _known(graph: CouplingGraph, place: Place, found: Carried) -> bool:
    """Tell whether units correspond along all other dimensions of a tensor."""
    name, dim = place
    others = [d for d in range(graph.program.tensor(name).dim()) if d != dim]
    return all(g.name in found for d in others for g in graph.group_of.get((name, d), ()))


def _written(
    frame: CouplingGraph,
    graph: CouplingGraph,
    group: CouplingGroup,
    ours: Tensors,
    theirs: Tensors,
    found: Carried,
) -> tuple[Matrix, Matrix] | None:
    """The parameters that write each unit, of both members, [n_units, *]; None if none compare."""
    places = [p for p in writing_places(graph, group) if _known(graph, p, found)]
    weights = _weights(graph, group)
    if not places or (weights and not set(weights) & set(places)):
        return None
    a, b, move = [], [], carrying(graph, found)
    standing: dict[str, Mask] = {n: np.any(merge != 0, axis=1) for n, (merge, _) in found.items()}
    for name, dim in places:
        common = shared(frame, name, ours[name], standing, skip=dim)
        a.append(units_of(common, dim, frame.rows_of(group.name, (name, dim))))
        carried = moved(graph, name, theirs[name], move, frame=frame, skip=dim)
        b.append(units_of(carried, dim, group.index[(name, dim)]))
    return np.concatenate(a, axis=1), np.concatenate(b, axis=1)
