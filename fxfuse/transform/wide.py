"""The plan of the wide model, which keeps every unit of every member."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fxfuse.analysis.coupling import CouplingGraph
from fxfuse.planning.options import Options, State
from fxfuse.planning.plan import FusionPlan, Mixing
from fxfuse.planning.planner import make_plan
from fxfuse.transform.resizing import apart_names


def concatenation_plan(
    graph: CouplingGraph,
    states: Sequence[State],
    mixing: Mixing = "per_member",
    *,
    base_member: int = 0,
) -> FusionPlan:
    """The plan that keeps every unit of every member.

    Args:
        graph: The analysis of the members.
        states: For each member, its tensors by name.
        mixing: How operators that mix members run, as in `FusionPlan`.
        base_member: The member that keeps what is frozen inside the network, where they run
        jointly.

    Raises:
        RewriteError: The network cannot be written with members that run one by one.
    """
    plan = make_plan(graph, states, "wide", Options(), base_member=base_member)
    if mixing == "joint":
        return plan
    plan = replace(plan, mixing=mixing)
    return replace(plan, apart=apart_names(graph, plan))
