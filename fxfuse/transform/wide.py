"""The plan of the wide model, which keeps every unit of every member."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from fxfuse.analysis.coupling import CouplingGraph
from fxfuse.planning.options import Options, State
from fxfuse.planning.plan import FusionPlan, MixingMode
from fxfuse.planning.planner import make_plan
from fxfuse.planning.roles import kept_per_member
from fxfuse.transform.resizing import apart_names


def concatenation_plan(
    graph: CouplingGraph,
    states: Sequence[State],
    mixing: MixingMode = "per_member",
    *,
    absent: Mapping[str, Collection[int]] = MappingProxyType({}),
) -> FusionPlan:
    """The plan that keeps every unit of every member."""
    plan = make_plan(graph, states, "wide", Options(absent=absent))
    if mixing == "joint":
        return plan
    plan = replace(plan, mixing=replace(plan.mixing, mode=mixing))
    return replace(plan, roles=kept_per_member(plan.roles, apart_names(graph, plan)))
