"""Planning: an analysis, members and a method become a plan."""

from __future__ import annotations

from collections.abc import Sequence

from fxfuse.analysis.coupling import CouplingGraph
from fxfuse.planning.context import Context, State
from fxfuse.planning.methods import Method
from fxfuse.planning.plan import FusionPlan
from fxfuse.planning.roles import (
    copied_names,
    hosted_names,
    hosted_reasons,
    inner_averages,
    relevant_notes,
)


def make_plan(
    graph: CouplingGraph,
    states: Sequence[State],
    method: Method,
    context: Context,
) -> FusionPlan:
    """Asks a method for its maps and notes what they leave open.

    A method sees the trunk only: heads of different tasks cannot be compared.

    Args:
        graph: The analysis of the members.
        states: For each member, its tensors by name.
        method: The method.
        context: What it may look at.

    Raises:
        OptionError: An option has a value that the method cannot use.
        InputError: The method or the score needs calibration inputs, and there are none.
        MissingDependencyError: The method needs a package that is not installed.
    """
    trunk = graph.trunk()
    maps = method.maps(trunk, states, context)
    return FusionPlan(
        method.name,
        method.described(trunk, context),
        len(states),
        context.base_member,
        maps,
        inner_averages(graph, states),
        hosted_names(graph),
        copied_names(graph),
        relevant_notes(graph, states),
        graph.program.heads,
        reasons=hosted_reasons(graph),
    )
