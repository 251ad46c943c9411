"""Averaging after alignment by optimal transport (OTFusion)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.spatial.distance import cdist
from torch import nn

from fxfuse.calibrated import Matrix, require_activations
from fxfuse.coupling import CouplingGraph, CouplingGroup
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
                name: _transport(pot, cdist(found[reference].T, found[i].T), regularisation)
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
    """Transports one group after the other, each along what was transported before it."""
    found: Transports = {}
    for group in graph.groups:
        features = _written(graph, group, ours, theirs, found)
        if features is None:
            # Nothing that writes this group comes from where units correspond already.
            cost = np.sqrt(statistics_distance(graph, group, ours, theirs))
        else:
            cost = cdist(*features)
        found[group.name] = _transport(pot, cost, regularisation)
    return found


def _written(
    graph: CouplingGraph,
    group: CouplingGroup,
    ours: Tensors,
    theirs: Tensors,
    found: Transports,
) -> tuple[Matrix, Matrix] | None:
    """The weights that write each unit, of both members, [n_units, *]; None if none compare."""

    def move(other: CouplingGroup, units: Matrix) -> Matrix:
        return found[other.name] @ units

    pairs = []
    for (name, dim), rows in own_places(graph, group).items():
        tensor = graph.captured.tensor(name)
        others = (
            g for d in range(tensor.dim()) if d != dim for g in graph.group_of.get((name, d), ())
        )
        known = all(other.name in found for other in others)
        if known and isinstance(tensor, nn.Parameter) and is_written(graph, (name, dim)):
            moving = moved(graph, name, theirs[name], move, skip=dim)
            pairs.append((units_of(ours[name], dim, rows), units_of(moving, dim, rows)))
    if not pairs:
        return None
    a, b = zip(*pairs, strict=True)
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
