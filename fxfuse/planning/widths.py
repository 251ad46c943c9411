"""From a width, in units of a member, to the number of units of every coupling group."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from math import gcd, isfinite

import numpy as np

from fxfuse.analysis.constraints import nothing_like
from fxfuse.analysis.coupling import CouplingGraph, CouplingGroup
from fxfuse.errors import OptionError

#: A width for all groups, or by pattern of `state_dict()` names; 1 is a member's size.
Width = float | Mapping[str, float]
#: Units of each fused group, by the group's name.
Sizes = dict[str, int]


def sizes_of(
    graph: CouplingGraph,
    n_members: int,
    width: Width,
    round_to: int = 1,
    *,
    at_least_one: bool = False,
) -> Sizes:
    """The units of each fused group.

    Args:
        graph: The analysis of the members.
        n_members: N.
        width: In units of a member: 1 is a member's size, N keeps everything. Or a mapping of
            `fnmatch` patterns of `state_dict()` names to widths: a pattern speaks of the coupling
            groups that are named after a tensor it matches, as `CouplingGraph.groups` lists them.
            Groups that no pattern matches keep a member's size.
        round_to: The channels of a group are rounded to a multiple of this, where it has as many.
        at_least_one: Whether a group that the width leaves without a unit keeps one.
    """
    if round_to < 1:
        raise OptionError(
            f"round_to must be at least 1, got {round_to}",
            how="use 8 for most hardware, or leave it out",
        )
    widths = {group.name: 1.0 for group in graph.groups}
    if isinstance(width, Mapping):
        widths |= by_pattern(graph, "width", width)
    else:
        widths = dict.fromkeys(widths, float(width))
    for value in widths.values():
        _check(value, n_members)
    return {
        group.name: units_at(
            graph, group, n_members, widths[group.name], round_to, least=int(at_least_one)
        )
        for group in graph.groups
    }


def by_pattern(graph: CouplingGraph, option: str, values: Mapping[str, float]) -> dict[str, float]:
    """The value of each coupling group that a pattern speaks of."""
    found: dict[str, tuple[float, str]] = {}
    names = {group.name: group.name.rpartition(":")[0] for group in graph.groups}
    for pattern, value in values.items():
        matched = [group for group, name in names.items() if fnmatchcase(name, pattern)]
        if not matched:
            why = "no coupling group is named after such a tensor"
            nothing_like(pattern, option, tuple(dict.fromkeys(names.values())), why)
        for group in matched:
            before, earlier = found.setdefault(group, (float(value), pattern))
            if before != float(value):
                raise OptionError(
                    f"two patterns of {option} contradict each other",
                    where=f"coupling group {group}",
                    why=f"{earlier!r} sets {before:g}, and {pattern!r} sets {value:g}",
                    how="use patterns of which one matches each group",
                )
    return {group: value for group, (value, _) in found.items()}


def _check(width: float, n_members: int) -> None:
    if isfinite(width) and 0 < width <= n_members:
        return
    raise OptionError(
        f"width must be in (0, {n_members}], got {width:g}",
        why=f"it is in units of a member: 1 is a member's size, {n_members} keeps everything",
        how=f"use a number in (0, {n_members}]",
    )


def units_at(
    graph: CouplingGraph,
    group: CouplingGroup,
    n_members: int,
    width: float,
    round_to: int,
    *,
    least: int = 1,
) -> int:
    """The units of a group at a width, its channels rounded as in `sizes_of`."""
    each = [graph.units_of(group.name, member) for member in range(n_members)]
    most, one = sum(each), sum(each) / len(each)
    wanted = width * one
    # Units of several channels: heads, groups of a convolution.
    channels = next(rows.shape[1] for rows in group.index.values())
    step = round_to // gcd(round_to, channels)
    if 1 < step <= most:
        # A half is rounded up.
        units = max(step, int(np.floor(wanted / step + 0.5)) * step)
        return min(units, most // step * step)
    units = max(min(int(np.floor(wanted + 0.5)), most), least)
    if units < 1:
        raise OptionError(
            f"width {width:g} leaves no unit in coupling group {group.name!r}",
            why=f"a member has {one:g} units there",
            how=f"use a width of at least {0.5 / one:.2g} there",
        )
    return units
