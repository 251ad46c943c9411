"""The plan of a method at the sizes that are asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from fxfuse.analysis.coupling import CouplingGraph
from fxfuse.errors import OptionError, RewriteError
from fxfuse.planning.allocation import spread
from fxfuse.planning.options import Options, State
from fxfuse.planning.plan import FusionPlan
from fxfuse.planning.planner import make_plan
from fxfuse.transform.resize import Target, mixing_of, resized
from fxfuse.transform.wide import concatenation_plan

#: Methods that fill any number of units; the others give each fused unit a reference's place.
_ANY_WIDTH = ("auto", "transplant", "wide", "zip")


def make_sized_plan(
    graph: CouplingGraph,
    states: Sequence[State],
    method: str,
    options: Options,
    target: Target,
    *,
    fitted: bool,
) -> FusionPlan:
    """Finds the sizes, asks the method for its maps, and notes which groups keep their size."""
    count = len(states)
    if method == "wide":
        target = replace(target, width=_width_of_all(target, count))
    mixing = mixing_of(graph, count, target, fitted=fitted)
    wider = None
    if target.budget == "global":
        wider = spread(graph, states, options, target.round_to)
    found = resized(graph, count, target, mixing, wider)
    if found is not None:
        _check_resizable(found[0], graph, method)
    sizes, kept = found or (None, {})
    plan = None
    if mixing == "per_member":
        try:
            plan = concatenation_plan(graph, states, absent=options.absent)
        except RewriteError:
            # Heads may begin before the last operator that mixes members.
            if target.mixing or not graph.program.heads:
                raise
    if plan is None:
        asked = "transplant" if method == "auto" else method
        plan = make_plan(graph, states, asked, replace(options, sizes=sizes))
    told = {"budget": "global"} if target.budget == "global" else {}
    maps = tuple(replace(m, kept=kept.get(m.group, "")) for m in plan.maps)
    return replace(plan, maps=maps, options={**plan.options, **told})


def _width_of_all(target: Target, n_members: int) -> int:
    if target.width not in (None, n_members):
        raise OptionError(
            f"width={target.width} and method='wide' contradict each other",
            why=f"the method keeps every unit of every member, which is width {n_members}",
            how="leave width out, or use method='transplant'",
        )
    return n_members


def _check_resizable(sizes: Mapping[str, int], graph: CouplingGraph, method: str) -> None:
    """Checks that a method works at another width than a member's."""
    if all(sizes[group.name] == group.n_units for group in graph.groups):
        return
    if method in _ANY_WIDTH:
        return
    raise OptionError(
        f"method {method!r} works at a member's width only",
        why="it puts every fused unit in the place of a unit of the reference member",
        how="leave the size out, or use method='transplant', 'zip' or 'auto'",
    )
