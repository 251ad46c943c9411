"""Planning: an analysis, members and a method become a plan."""

from __future__ import annotations

from collections.abc import Sequence

from fxfuse.coupling import CouplingGraph
from fxfuse.methods import Options, State, find_method
from fxfuse.plan import (
    FusionPlan,
    copied_names,
    hosted_names,
    inner_averages,
    relevant_notes,
)


def make_plan(
    graph: CouplingGraph,
    states: Sequence[State],
    method: str,
    options: Options,
    *,
    host: int = 0,
) -> FusionPlan:
    """Asks a method for its maps and notes what they leave open.

    A method sees the trunk only: heads of different tasks cannot be compared.

    Raises:
        UnknownMethodError: There is no such method or variant.
        UnknownScoreError: There is no such score.
    """
    maps = find_method(method)(graph.trunk(), states, options)
    told = {"score": options.score} if method == "transplant" else {}
    if options.variant is not None:
        told["variant"] = options.variant
    return FusionPlan(
        method,
        told,
        len(states),
        host,
        maps,
        inner_averages(graph, states),
        hosted_names(graph),
        copied_names(graph),
        relevant_notes(graph, states),
        graph.captured.heads,
    )
