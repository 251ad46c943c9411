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
    """Ask a method for its maps and note what they leave open.

    A method sees the trunk only: heads of different tasks cannot be compared.
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
