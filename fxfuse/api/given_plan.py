"""A plan that is given in place of being made: is it for these members, and is it alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from typing import Any

import torch

from fxfuse.analysis.coupling import CouplingGraph, Index
from fxfuse.errors import OptionError, PlanError
from fxfuse.members.fingerprint import check_members
from fxfuse.planning.plan import FusionPlan, UnitMap

#: Options of `fuse` that may be given beside a plan: they speak of what is done with it.
BESIDE = frozenset(
    {
        "members",
        "example_inputs",
        "example_kwargs",
        "template",
        "group",
        "plan",
        "calibration",
        "calibration_limit",
        "calibration_copies",
        "refit",
        "outputs",
        "dynamic_shapes",
        "verify",
        "progress",
    }
)


def check_alone(function: Callable[..., Any], given: Mapping[str, Any]) -> None:
    """Checks that no option contradicts a plan that is given.

    Args:
        function: What takes the plan: an option counts as given where it is not at its default.
        given: Every option by name.

    Raises:
        OptionError: An option is given that the plan holds already.
    """
    defaults = {name: p.default for name, p in signature(function).parameters.items()}
    for name, value in given.items():
        # No pattern and an empty list of patterns are the same.
        if name not in BESIDE and value != defaults[name] and value not in ([], {}, ()):
            raise OptionError(
                f"{name}={value!r} and plan= contradict each other",
                why="the plan already holds the method, its options, the sizes and the constraints",
                how=f"leave {name} out, or leave plan out to make a new plan",
            )


def check_count(plan: FusionPlan, count: int) -> None:
    """Checks that there are as many members as a plan was made for.

    Raises:
        PlanError: There are more or fewer.
    """
    if count != plan.n_members:
        raise PlanError(
            f"the plan was made for {plan.n_members} members, got {count}",
            how="pass the networks that were fused, in the same order",
        )


def check_plan(
    plan: FusionPlan, graph: CouplingGraph, states: Sequence[Mapping[str, torch.Tensor]]
) -> None:
    """Checks that a plan can be applied to members.

    Args:
        plan: The plan.
        graph: The analysis of the members, with the plan's constraints.
        states: For each member, its tensors by name.

    Raises:
        PlanError: The plan was made for other members.
        PlanError: The plan does not say for which members it was made, its groups are not those of
            the network, or a map names a unit that there is not.
    """
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
