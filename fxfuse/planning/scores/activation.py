"""Score `activation`: how strongly a unit answers to the calibration inputs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fxfuse.analysis.coupling import CouplingGraph
from fxfuse.planning.context import Context, State
from fxfuse.planning.measured import matrix_of, require_activations
from fxfuse.planning.scores.registry import Kept, Scores, score


@score("activation")
def activation(
    graph: CouplingGraph, states: Sequence[State], context: Context, kept: Kept
) -> dict[int, Scores]:
    """Compute the root mean square of a unit's activation over the calibration inputs."""
    answers = require_activations(graph, states, context, "score 'activation'")
    return {
        member: {
            name: np.sqrt((matrix_of(members[member]) ** 2).mean(axis=0))
            for name, members in answers.items()
        }
        for member in kept
    }
