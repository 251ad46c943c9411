"""Checks before a fused network is returned: the analysis, a given plan, and the oracles."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from math import isfinite

import torch

from fxfuse.analysis.coupling import CouplingGraph, Index
from fxfuse.analysis.freezing import excused
from fxfuse.errors import OptionError, PlanError, VerificationError
from fxfuse.graph.capture import check_reached
from fxfuse.members.fingerprint import check_members
from fxfuse.planning.plan import FusionPlan, UnitMap
from fxfuse.verify import Check, Verification, permutation_of, wrong_groups


def check_kind(name: str, given: object, kind: type) -> None:
    """Check that an option is an object of its class, or left out."""
    if given is not None and not isinstance(given, kind):
        raise OptionError(
            f"{name} is a {type(given).__name__}, not {kind.__name__}",
            where=name,
            how=f"pass fxfuse.{kind.__name__}(...)",
        )


def check_sound(graph: CouplingGraph, *, verify: bool) -> tuple[CouplingGraph, list[Check]]:
    """Return what of a network can be fused or pruned, and what the permutation oracle says of it.

    Groups that the oracle cannot move are frozen; it runs only if `verify`.
    """
    check_reached(graph.program, excused(graph.asked))
    checks = []
    if verify:
        graph, check = _only_what_moves(graph)
        checks.append(check)
    _check_free(graph)
    return graph, checks


def _check_free(graph: CouplingGraph) -> None:
    if graph.groups:
        return
    if not list(graph.program.module.parameters()):
        raise PlanError(
            "nothing in this network can be fused",
            why="it has no parameters",
            how="pass networks with trained weights",
        )
    reasons = [r for r in graph.frozen.values() if r.node]
    reasons.sort(key=lambda reason: reason.interface)
    raise PlanError(
        "nothing in this network can be fused",
        where=f"{reasons[0].node}  {reasons[0].source}".rstrip() if reasons else "",
        why="every dimension of every parameter is frozen"
        + (f"; the first: {reasons[0].why}" if reasons else ""),
        how="see fxfuse.analyze(...).frozen for all reasons; "
        + (
            "use freeze, share and ignore for fewer tensors"
            if graph.asked
            else "write a rule for an operator that has none"
        ),
    )


def _only_what_moves(graph: CouplingGraph) -> tuple[CouplingGraph, Check]:
    """Freeze the groups that the permutation oracle cannot move, with a loud warning."""
    check = permutation_of(graph)
    wrong = () if check.passed or not isfinite(check.error) else wrong_groups(graph)
    if not wrong:
        return graph, check
    names = [g.name for g in wrong]
    warnings.warn(
        f"coupling groups {names} changed the network when permuted, so they are frozen and one "
        "member's weights are kept there. A rule of fxfuse is wrong: please report the network.",
        stacklevel=4,
    )
    graph = graph.freezing(names, "the permutation oracle could not move this group")
    return graph, permutation_of(graph)


def verified(checks: Sequence[Check]) -> Verification:
    """Return what the oracles found, or raise an error that names the first that failed."""
    failed = [check for check in checks if not check.passed]
    if failed:
        raise VerificationError(
            "the fused network failed its verification",
            where=", ".join(check.name for check in failed),
            why="; ".join(
                f"{c.name}: error {c.error:.2e}, tolerance {c.tolerance:.0e} {c.detail}"
                for c in failed
            ),
            how="check the members' weights, or use verify=False to get the network anyway",
        )
    return Verification(tuple(checks))


def check_count(wanted: int, count: int) -> None:
    """Check that there are as many members as a plan was made for."""
    if count != wanted:
        raise PlanError(
            f"the plan was made for {wanted} members, got {count}",
            how="pass the networks that were fused, in the same order",
        )


def check_plan(
    plan: FusionPlan, graph: CouplingGraph, states: Sequence[Mapping[str, torch.Tensor]]
) -> None:
    """Check that a plan can be applied to members."""
    tensors = [member.tensors for member in plan.members]
    if not all(tensors):
        raise PlanError(
            "the plan does not identify its members",
            why="it holds no hashes of their tensors",
            how="use a plan that fxfuse.fuse made",
        )
    check_members(tensors, states)
    differing = {entry.group for entry in plan.maps} ^ {group.name for group in graph.groups}
    if differing:
        raise PlanError(
            "the plan and the network have different coupling groups",
            where=min(differing),
            why=f"{len(differing)} groups are in only one of them",
            how="make the plan again with this version of fxfuse, with the same verify=",
        )
    unknown = plan.roles.keys() ^ {*graph.program.names}
    if unknown:
        raise PlanError(
            "the plan's tensors are not those of the network",
            where=min(unknown),
            why=f"{len(unknown)} of them are in one of the two only",
            how="use a plan that fxfuse.fuse made",
        )
    for entry in plan.maps:
        units = [graph.units_of(entry.group, member) for member in range(plan.n_members)]
        _check_map(entry, units, plan.n_members)


def _check_map(entry: UnitMap, units: Sequence[int], n_members: int) -> None:
    if entry.n_units > sum(units):
        raise PlanError(
            "the plan has more fused units than the members have units",
            where=entry.group,
            why=f"it has {entry.n_units} fused units, all members together have {sum(units)}",
            how="use a plan that fxfuse.fuse made",
        )
    _check_numbers(entry, "fused unit", entry.target, entry.n_units)
    _check_numbers(entry, "member", entry.member, n_members)
    for member, count in enumerate(units):
        _check_numbers(entry, "unit", entry.unit[entry.member == member], count)


def _check_numbers(entry: UnitMap, what: str, values: Index, count: int) -> None:
    wrong = values[(values < 0) | (values >= count)]
    if len(wrong):
        raise PlanError(
            f"{what} out of range: must be 0 to {count - 1}, got {wrong[0]}",
            where=entry.group,
            how="use a plan that fxfuse.fuse made",
        )
