"""Planning: an analysis, members and a method become a plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fxfuse.analysis.coupling import CouplingGraph
from fxfuse.planning.methods import Options, State, find_method
from fxfuse.planning.plan import FusionPlan, MemberRecord, Mixing
from fxfuse.planning.roles import make_roles, relevant_notes, units_of_members
from fxfuse.planning.scores import note_of


def make_plan(
    graph: CouplingGraph, states: Sequence[State], method: str, options: Options
) -> FusionPlan:
    """Asks a method for its maps and notes what they leave open.

    A method sees the trunk only: heads of different tasks cannot be compared.
    """
    graph.constraints.check_base_member(len(states))
    options = replace(options, base_member=graph.constraints.base_member)
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
        maps,
        make_roles(graph, states, options.absent),
        tuple(MemberRecord(units=n) for n in units_of_members(graph, len(states), options.absent)),
        graph.constraints,
        mixing=Mixing(notes=relevant_notes(graph, states)),
    )
