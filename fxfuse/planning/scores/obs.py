"""Score `obs`: in which order an optimal brain surgeon would remove the units."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fxfuse.activations import elimination
from fxfuse.analysis.coupling import CouplingGraph
from fxfuse.errors import InputError
from fxfuse.planning.context import Context, State
from fxfuse.planning.scores.magnitude import magnitude
from fxfuse.planning.scores.registry import Kept, Scores, score


@score("obs")
def obs(
    graph: CouplingGraph, states: Sequence[State], context: Context, kept: Kept
) -> dict[int, Scores]:
    """The later a unit would be removed, the higher (`fxfuse.activations.elimination`).

    What the members have in common counts once: of units that the others can make up for, in the
    least-squares sense at the layers that read them, one after the other goes. A group that no
    layer reads is scored by `l2`.
    """
    if context.calibration is None:
        raise InputError(
            "score 'obs' needs calibration inputs",
            why="it removes the units that others can replace on these inputs",
            how="pass calibration=..., 100 to 1,000 inputs without labels",
        )
    found = magnitude(graph, states, context, kept, degree=2)
    ranks = elimination(
        graph,
        states,
        context.calibration,
        kept,
        sizes=context.sizes,
        base_member=context.base_member,
    )
    for name, (units, rank) in ranks.items():
        for member in kept:
            values = np.full(len(found[member][name]), -np.inf)
            own = units[:, 0] == member
            values[units[own, 1]] = rank[own]
            found[member][name] = values
    return found
