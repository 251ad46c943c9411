"""Planning: an analysis, members and a method become a plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fxfuse.analysis.coupling import CouplingGraph
from fxfuse.planning.context import Context, State
from fxfuse.planning.methods import Method
from fxfuse.planning.plan import FusionPlan, MemberRecord, Mixing
from fxfuse.planning.roles import make_roles, relevant_notes, units_of_members


def make_plan(
    graph: CouplingGraph,
    states: Sequence[State],
    method: Method,
    context: Context,
) -> FusionPlan:
    """Asks a method for its maps and notes what they leave open.

    A method sees the trunk only: heads of different tasks cannot be compared.

    Args:
        graph: The analysis of the members; its constraints name the base member.
        states: For each member, its tensors by name.
        method: The method.
        context: What it may look at, but for the base member.

    Raises:
        OptionError: An option has a value that the method cannot use.
        InputError: The method or the score needs calibration inputs, and there are none.
        MissingDependencyError: The method needs a package that is not installed.
    """
    graph.constraints.check_base_member(len(states))
    context = replace(context, base_member=graph.constraints.base_member)
    trunk = graph.trunk()
    maps = method.maps(trunk, states, context)
    return FusionPlan(
        method.name,
        method.described(trunk, context),
        maps,
        make_roles(graph, states, context.absent),
        tuple(MemberRecord(units=n) for n in units_of_members(graph, len(states), context.absent)),
        graph.constraints,
        mixing=Mixing(notes=relevant_notes(graph, states)),
    )
