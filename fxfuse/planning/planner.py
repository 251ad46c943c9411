"""Planning: an analysis, members and a method become a plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fxfuse.analysis.coupling import CouplingGraph
from fxfuse.planning.methods import Options, State, find_method
from fxfuse.planning.plan import FusionPlan
from fxfuse.planning.roles import (
    copied_names,
    hosted_names,
    hosted_reasons,
    inner_averages,
    relevant_notes,
)
from fxfuse.planning.scores import note_of


def make_plan(
    graph: CouplingGraph,
    states: Sequence[State],
    method: str,
    options: Options,
    *,
    base_member: int = 0,
) -> FusionPlan:
    """Asks a method for its maps and notes what they leave open.

    A method sees the trunk only: heads of different tasks cannot be compared.

    Args:
        graph: The analysis of the members.
        states: For each member, its tensors by name.
        method: Name of the method.
        options: What it is told.
        base_member: The member that keeps what is frozen inside the network, in place of
        `options.base_member`.

    Raises:
        OptionError: There is no such method or variant.
        OptionError: There is no such score.
        OptionError: An option has a value that the method cannot use.
        InputError: The method or the score needs calibration inputs, and there are none.
        MissingDependencyError: The method needs a package that is not installed.
    """
    options = replace(options, base_member=base_member)
    maps = find_method(method)(graph.trunk(), states, options)
    told = {}
    if method == "transplant":
        told = {"score": options.score, **note_of(options.score, graph.trunk())}
    for name in ("variant", "fraction", "reference", "regularisation"):
        value = getattr(options, name)
        # What was left at its default says nothing.
        if value != getattr(Options(), name):
            told[name] = str(value)
    return FusionPlan(
        method,
        told,
        len(states),
        base_member,
        maps,
        inner_averages(graph, states),
        hosted_names(graph),
        copied_names(graph),
        relevant_notes(graph, states),
        graph.program.heads,
        reasons=hosted_reasons(graph),
    )
