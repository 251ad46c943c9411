"""Averaging after alignment by optimal transport (OTFusion)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy.spatial.distance import cdist

from fxfuse.analysis.coupling import CouplingGraph, CouplingGroup
from fxfuse.errors import MissingDependencyError, OptionError
from fxfuse.planning.context import Context, State
from fxfuse.planning.measured import Matrix, matrix_of, require_activations
from fxfuse.planning.methods._alignment import frame_of, reference_of
from fxfuse.planning.methods._from_input import Carried, from_the_input
from fxfuse.planning.methods._unit_weights import real_tensors
from fxfuse.planning.methods.registry import Method, method
from fxfuse.planning.plan import UnitMap

#: Entries of a transport below this are left out.
_NEGLIGIBLE = 1e-9
_ITERATIONS = 10_000


@method("optimal_transport")
@dataclass(frozen=True)
class OptimalTransport(Method):
    """Transports the units of every member to those of the reference, then averages.

    Singh & Jaggi, "Model Fusion via Optimal Transport", arXiv:1910.05653: uniform mass on the
    units, cost the Euclidean distance of the weights that write them (variant `weights`, the
    default; from the input on, each group after those that it reads from) or of their activations
    (variant `activations`). Exact, or entropic with `regularisation`. With transport T of member i
    [n, m], of total mass 1, M = nT/N and U = mTᵀ: each fused unit is a mean of units, and each unit
    reads a mean of fused units, also where members differ in width and T is rectangular. (The paper
    divides by the reference's mass in both places: then a member of twice the width, in which every
    unit stands twice, would be halved by every layer.) Mass is uniform, so that every unit counts,
    dead ones too.

    Attributes:
        variant: What units are compared by: the weights that write them, or their activations.
        reference: Member that the others are transported to, by number.
        regularisation: Entropic regularisation, in units of the mean cost; None is exact.
    """

    variant: Literal["weights", "activations"] = "weights"
    reference: int = 0
    regularisation: float | None = None

    def __post_init__(self) -> None:
        """Check that the reference is a member."""
        if str(self.reference) == "mean":
            raise OptionError(
                "reference='mean' does not work with optimal_transport",
                why="it transports every member to the units of one of them",
                how="pass reference= with the number of a member",
            )
        super().__post_init__()

    @property
    def weights_only(self) -> bool:
        """Whether it looks at weights only: not with activations."""
        return self.variant == "weights"

    def maps(
        self, graph: CouplingGraph, states: Sequence[State], context: Context
    ) -> tuple[UnitMap, ...]:
        """Make the maps."""
        reference = reference_of(self.reference, len(states))
        assert reference is not None
        regularisation = self.regularisation
        if regularisation is not None and not 0 < regularisation < float("inf"):
            raise OptionError(
                f"regularisation must be above 0 and finite, got {regularisation}",
                why="it is the weight of the entropy of a transport",
                how="use None for exact transport, or a value such as 0.05",
            )
        pot = _pot()
        frame_of(graph, len(states), self.reference, context)
        frame = graph.of_member(reference)

        def solve(group: CouplingGroup, cost: Matrix, own: Matrix) -> tuple[Matrix, Matrix]:
            return _transport(pot, cost, regularisation)

        if self.variant == "activations":
            user = "variant 'activations' of optimal_transport"
            answers = require_activations(graph, states, context, user)

            def transported(member: int) -> Carried:
                units = {
                    n: (matrix_of(t[reference]).T, matrix_of(t[member]).T)
                    for n, t in answers.items()
                }
                return {
                    n: _transport(pot, cdist(*both), regularisation) for n, both in units.items()
                }
        else:
            ours = real_tensors(frame, states[reference])

            def transported(member: int) -> Carried:
                own = graph.of_member(member)
                return from_the_input(frame, own, ours, real_tensors(own, states[member]), solve)

        whole = {g.name: (np.eye(g.n_units), np.eye(g.n_units)) for g in frame.groups}
        found = [whole if i == reference else transported(i) for i in range(len(states))]
        without = [graph.lacking(context.absent, i) for i in range(len(states))]
        return tuple(
            _map_of(group, [t[group.name] for t in found], [group.name in w for w in without])
            for group in frame.groups
        )


def _pot() -> Any:
    try:
        import ot
    except ImportError as error:
        raise MissingDependencyError(
            "method 'optimal_transport' needs POT", how='pip install "fxfuse[ot]"'
        ) from error
    return ot


def _transport(pot: Any, cost: Matrix, regularisation: float | None) -> tuple[Matrix, Matrix]:
    """A transport between uniform masses, its rows scaled to sum 1, or its columns; [n, m] both."""
    n, m = cost.shape
    masses = np.full(n, 1.0 / n), np.full(m, 1.0 / m)
    if regularisation is None:
        plan = pot.emd(*masses, cost)
    else:
        # In units of the mean cost, so that one value serves layers of any scale.
        strength = regularisation * max(float(cost.mean()), np.finfo(np.float64).tiny)
        plan = pot.sinkhorn(*masses, cost, strength, method="sinkhorn_log", numItermax=_ITERATIONS)
    return n * plan, m * plan


def _map_of(
    group: CouplingGroup, transports: Sequence[tuple[Matrix, Matrix]], without: Sequence[bool]
) -> UnitMap:
    entries = [
        np.nonzero((merge > _NEGLIGIBLE) & (not lacks))
        for (merge, _), lacks in zip(transports, without, strict=True)
    ]
    merge, read = (
        np.concatenate([t[which][at] for t, at in zip(transports, entries, strict=True)])
        for which in (0, 1)
    )
    return UnitMap(
        group.name,
        group.n_units,
        np.concatenate([rows for rows, _ in entries]),
        np.repeat(np.arange(len(transports)), [len(rows) for rows, _ in entries]),
        np.concatenate([columns for _, columns in entries]),
        merge / (len(transports) - sum(without)),
        read,
    )
