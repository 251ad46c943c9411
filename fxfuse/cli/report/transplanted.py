"""Where the units of every group come from, and how much of the members' score they hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from torch import nn

from fxfuse.analysis.coupling import CouplingGraph
from fxfuse.api.result import FusionResult
from fxfuse.errors import InputError
from fxfuse.members.fingerprint import fingerprint
from fxfuse.planning.context import Context
from fxfuse.planning.plan import FusionPlan, UnitMap
from fxfuse.planning.scores import score_units, scores
from fxfuse.refine.fused import states_of

#: Origin of a unit that several members have a part in.
SEVERAL = -1
#: The score that stands for a method that has none.
_DEFAULT_SCORE = "l2"


@dataclass(frozen=True)
class Run:
    """Fused units from `start` up to `stop` that come from one member, or from `SEVERAL`."""

    start: int
    stop: int
    member: int


@dataclass(frozen=True)
class GroupShare:
    """Where the units of a group come from.

    Attributes:
        n_units: Units of the fused group.
        available: Units of all members.
        counts: Units that come from each member; those of several members count for each.
        runs: The fused units in order.
        kept: Share of the members' summed score that the kept units have, in [0, 1]; None where it
            is not known.
    """

    group: str
    n_units: int
    available: int
    counts: tuple[int, ...]
    runs: tuple[Run, ...]
    kept: float | None


def planned(plan: FusionPlan, members: Sequence[nn.Module]) -> Sequence[nn.Module]:
    """Return the members that a plan is for: all, or those that stand side by side in it."""
    if plan.n_members == len(members):
        return members
    known = [record.tensors for record in plan.members]
    return [member for member in members if fingerprint(member.state_dict()) in known]


def shares(
    result: FusionResult, members: Sequence[nn.Module] | None = None
) -> tuple[GroupShare, ...]:
    """Return where the units of every group come from; scores are known only with `members`."""
    plan, graph = result.plan, result.graph
    kept = {} if members is None else _kept(graph, result, planned(plan, members))
    return tuple(
        GroupShare(
            m.group,
            m.n_units,
            sum(graph.units_of(m.group, i) for i in range(plan.n_members)),
            m.counts(plan.n_members),
            _runs(m),
            kept.get(m.group),
        )
        for m in plan.maps
    )


def _runs(m: UnitMap) -> tuple[Run, ...]:
    origin = np.full(m.n_units, SEVERAL - 1)
    for target, member in np.unique(np.stack([m.target, m.member]), axis=1).T.tolist():
        origin[target] = member if origin[target] == SEVERAL - 1 else SEVERAL
    edges = np.flatnonzero(np.diff(origin)) + 1
    bounds = [0, *edges.tolist(), m.n_units]
    return tuple(
        Run(start, stop, int(origin[start])) for start, stop in pairwise(bounds) if stop > start
    )


def _kept(
    graph: CouplingGraph, result: FusionResult, members: Sequence[nn.Module]
) -> dict[str, float]:
    """Share of the members' score that every group keeps; empty where it cannot be measured."""
    plan = result.plan
    score, context = plan.options.get("score", _DEFAULT_SCORE), Context(absent=plan.absent)
    if score not in scores():
        return {}
    units = {
        i: {g.name: np.arange(g.n_units) for g in graph.of_member(i).groups}
        for i in range(len(members))
    }
    states = states_of(result, members)
    try:
        found = score_units(graph.trunk(), states, score, context, units)
    # It needs calibration inputs, which the report does not have.
    except InputError:
        return {}
    kept = {}
    for m in plan.maps:
        whole = sum(float(found[i][m.group].sum()) for i in range(len(members)))
        part = sum(float(found[i][m.group][unit]) for i, unit in m.units().tolist())
        if whole > 0:
            kept[m.group] = part / whole
    return kept
