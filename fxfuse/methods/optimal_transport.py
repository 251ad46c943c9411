"""Averaging after alignment by optimal transport (OTFusion)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.spatial.distance import cdist
from torch import nn

from fxfuse.calibrated import Matrix, matrix_of, require_activations
from fxfuse.coupling import CouplingGraph, CouplingGroup, Place
from fxfuse.errors import ControlError, MissingDependencyError
from fxfuse.methods._alignment import reference_of
from fxfuse.methods._unit_weights import (
    Tensors,
    moved,
    own_places,
    real_tensors,
    statistics_distance,
    units_of,
)
from fxfuse.methods.registry import check_variant, method
from fxfuse.options import Options, State
from fxfuse.plan import UnitMap, is_written

VARIANTS = ("weights", "activations")

#: For each group, how much of each unit of the member (columns) goes to each unit of the reference
#: (rows), float64 [n, n]; rows sum to 1.
Transports = dict[str, Matrix]

#: Entries of a transport below this are left out.
_NEGLIGIBLE = 1e-9
_ITERATIONS = 10_000


@method("optimal_transport")
def optimal_transport(
    graph: CouplingGraph, states: Sequence[State], options: Options
) -> tuple[UnitMap, ...]:
    """Transports the units of every member to those of the reference, then averages.

    Singh & Jaggi, "Model Fusion via Optimal Transport", arXiv:1910.05653: uniform mass on the
    units, cost the Euclidean distance of the weights that write them (variant `weights`, the
    default; from the input on, each group after those that it reads from) or of their activations
    (variant `activations`). Exact, or entropic with `regularisation`. With transport T of member i,
    M = T/N and U = Tᵀ.

    Raises:
        MissingDependencyError: POT is not installed.
        CalibrationError: Variant `activations` has none.
        ControlError: There is no such reference member, or the regularisation is not positive.
        UnknownMethodError: The variant is unknown.
    """
    check_variant("optimal_transport", options, VARIANTS)
    reference = reference_of(options, len(states))
    if reference is None:
        raise ControlError(
            'optimal_transport has no reference "mean"',
            why="it transports every member to the units of one of them",
            how="pass reference= with the number of a member",
        )
    regularisation = options.regularisation
    if regularisation is not None and not 0 < regularisation < float("inf"):
        raise ControlError(
            f"regularisation {regularisation} is not positive",
            why="it is the weight of the entropy of a transport",
            how="use None for exact transport, or a value such as 0.05",
        )
    pot = _pot()
    if options.variant == "activations":
        user = "variant 'activations' of optimal_transport"
        answers = require_activations(graph, states, options, user)
        transports = [
            {
                name: _transport(
                    pot,
                    cdist(matrix_of(found[reference]).T, matrix_of(found[i]).T),
                    regularisation,
                )
                for name, found in answers.items()
            }
            for i in range(len(states))
            if i != reference
        ]
    else:
        ours = real_tensors(graph, states[reference])
        transports = [
            _by_weights(pot, graph, ours, real_tensors(graph, states[i]), regularisation)
            for i in range(len(states))
            if i != reference
        ]
    transports.insert(reference, {g.name: np.eye(g.n_units) for g in graph.groups})
    return tuple(_map_of(group, [t[group.name] for t in transports]) for group in graph.groups)


def _pot() -> Any:
    try:
        import ot
    except ImportError as error:
        raise MissingDependencyError(
            "method 'optimal_transport' needs POT", how='pip install "fxfuse[ot]"'
        ) from error
    return ot


def _by_weights(
    pot: Any, graph: CouplingGraph, ours: Tensors, theirs: Tensors, regularisation: float | None
) -> Transports:
    """Transports one group after the other, each along what was transported before it.

    Groups whose writers all come from where units correspond go first: the graph's order is that
    of the tensors' names, which need not be that of the layers.
    """
    found: Transports = {}
    waiting = list(graph.groups)
    while waiting:
        group = min(waiting, key=lambda g: _missing(graph, g, found))
        waiting.remove(group)
        features = _written(graph, group, ours, theirs, found)
        if features is None:
            # Nothing that writes this group comes from where units correspond already.
            cost = np.sqrt(statistics_distance(graph, group, ours, theirs))
        else:
            cost = cdist(*features)
        found[group.name] = _transport(pot, cost, regularisation)
    return found


def _missing(graph: CouplingGraph, group: CouplingGroup, found: Transports) -> int:
    """How far a group is from being compared: 0 by all that writes it, 1 by some of it, 2 by none.

    Vectors (biases, scales) do not count where there is more: alone they say too little of a unit.
    """
    known = [_known(graph, place, found) for place in _weights(graph, group)]
    return 0 if all(known) else 1 if any(known) else 2


def _weights(graph: CouplingGraph, group: CouplingGroup) -> list[Place]:
    """The parameters of more than one dimension that write a group."""
    return [place for place in _writers(graph, group) if graph.captured.tensor(place[0]).dim() > 1]


def _writers(graph: CouplingGraph, group: CouplingGroup) -> list[Place]:
    return [
        place
        for place in own_places(graph, group)
        if isinstance(graph.captured.tensor(place[0]), nn.Parameter) and is_written(graph, place)
    ]


def _known(graph: CouplingGraph, place: Place, found: Transports) -> bool:
    """Whether units correspond along all other dimensions of a tensor."""
    name, dim = place
    others = [d for d in range(graph.captured.tensor(name).dim()) if d != dim]
    return all(g.name in found for d in others for g in graph.group_of.get((name, d), ()))


def _written(
    graph: CouplingGraph,
    group: CouplingGroup,
    ours: Tensors,
    theirs: Tensors,
    found: Transports,
) -> tuple[Matrix, Matrix] | None:
    """The parameters that write each unit, of both members, [n_units, *]; None if none compare."""

    def move(other: CouplingGroup, units: Matrix) -> Matrix:
        return found[other.name] @ units

    places = [place for place in _writers(graph, group) if _known(graph, place, found)]
    weights = _weights(graph, group)
    if not places or (weights and not set(weights) & set(places)):
        return None
    a, b = [], []
    for name, dim in places:
        rows = group.index[(name, dim)]
        a.append(units_of(ours[name], dim, rows))
        b.append(units_of(moved(graph, name, theirs[name], move, skip=dim), dim, rows))
    return np.concatenate(a, axis=1), np.concatenate(b, axis=1)


def _transport(pot: Any, cost: Matrix, regularisation: float | None) -> Matrix:
    """A transport between uniform masses, scaled so that rows and columns sum to 1, [n, n]."""
    n = len(cost)
    mass = np.full(n, 1.0 / n)
    if regularisation is None:
        plan = pot.emd(mass, mass, cost)
    else:
        # In units of the mean cost, so that one value serves layers of any scale.
        strength = regularisation * max(float(cost.mean()), np.finfo(np.float64).tiny)
        plan = pot.sinkhorn(
            mass, mass, cost, strength, method="sinkhorn_log", numItermax=_ITERATIONS
        )
    scaled: Matrix = n * plan
    return scaled


def _map_of(group: CouplingGroup, transports: Sequence[Matrix]) -> UnitMap:
    entries = [np.nonzero(t > _NEGLIGIBLE) for t in transports]
    carried = np.concatenate([t[at] for t, at in zip(transports, entries, strict=True)])
    return UnitMap(
        group.name,
        group.n_units,
        np.concatenate([rows for rows, _ in entries]),
        np.repeat(np.arange(len(transports)), [len(rows) for rows, _ in entries]),
        np.concatenate([columns for _, columns in entries]),
        carried / len(transports),
        carried,
    )
