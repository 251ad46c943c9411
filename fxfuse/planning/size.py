"""The size of a fused network: what a caller asks for, and the units of every coupling group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import gcd, isfinite
from typing import Any, Literal

import numpy as np

from fxfuse.analysis.constraints import nothing_like
from fxfuse.analysis.coupling import CouplingGraph, CouplingGroup
from fxfuse.common.options import Options, described
from fxfuse.errors import OptionError

#: A width for all groups, or by pattern of `state_dict()` names; 1 is a member's size.
Width = float | Mapping[str, float]
#: Units of each fused group, by the group's name.
Sizes = dict[str, int]
#: How operators that mix members (LayerNorm and the like) run.
MixingMode = Literal["joint", "per_member"]


@dataclass(frozen=True)
class Size(Options):
    """The size of a fused or pruned network: a width, or a budget for which a width is found.

    Attributes:
        width: Size in units of one member, in (0, N]: 1 is a member's size, N keeps every unit of
            every member, which is their mean exactly. Or widths by `fnmatch` pattern of the
            tensors that coupling groups are named after. None: a member's size, or what the budget
            allows.
        max_params: Largest number of parameters, in place of a width; the widest network is made.
        max_flops: Largest number of floating-point operations on the example inputs, in place of a
            width.
        latency: Longest time in milliseconds that the network may take, as it is and where it is,
            on as many threads as torch uses; in place of a width. It is measured on the example
            inputs.
        batch: Number of inputs that `latency` is meant for; None: as many as the example has.
        multiple_of: Round channels to multiples of this, 8 for most hardware.
        allocation: `uniform` gives every group the width; `auto` gives each group as many units as
            buy most for their parameters (for their operations with `max_flops`, for their time
            with `latency`), within the same budget: that of the width, where one is given.
        mixing: How operators that mix members (LayerNorm and the like) run: `joint` over the kept
            units of all members together, or `per_member`, which needs width N and is the default
            there.
    """

    width: float | Mapping[str, float] | None = None
    max_params: int | None = None
    max_flops: int | None = None
    latency: float | None = None
    batch: int | None = None
    multiple_of: int = 1
    allocation: Literal["uniform", "auto"] = "uniform"
    mixing: MixingMode | None = None

    def __post_init__(self) -> None:
        """Check that a size is asked for once, and that an allocation has one to spread."""
        if not isinstance(self.width, int | float | Mapping | None):
            raise OptionError(
                f"width cannot be {described(self.width)}: {self.width!r:.99}",
                where="size",
                how="pass a number such as 0.5, numbers by pattern, or a Size",
            )
        super().__post_init__()
        for name in ("max_params", "max_flops", "batch", "multiple_of"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise OptionError(
                    f"{name} must be at least 1, got {value}",
                    where=f"Size({name}=...)",
                    how="pass a larger number, or leave it out",
                )
        if self.latency is not None and not (self.latency > 0 and isfinite(self.latency)):
            raise OptionError(
                f"latency must be greater than 0, got {self.latency:g}",
                where="Size(latency=...)",
                why="it is the time in milliseconds that one call may take",
                how="pass a positive number, or leave it out",
            )
        if self.batch is not None and self.latency is None:
            raise OptionError(
                "batch needs a latency",
                why="it is the number of inputs that the latency is meant for",
                how="pass latency=5 for 5 milliseconds, for instance, or leave batch out",
            )
        if self.width is not None and self.is_budget:
            raise OptionError(
                "width and a budget contradict each other",
                why="max_params, max_flops and latency look for the width",
                how="leave one of them out",
            )
        if self.allocation == "uniform":
            return
        if not self.is_given:
            raise OptionError(
                "allocation='auto' needs a size to spread",
                why="neither a width nor a budget is given",
                how="pass width=0.5 to keep half of all units, for instance",
            )
        if isinstance(self.width, Mapping):
            raise OptionError(
                "allocation='auto' and a width for each pattern contradict each other",
                why="this allocation decides how wide each group is",
                how="pass one width for all groups, or leave the allocation out",
            )

    @staticmethod
    def of(size: Any) -> Size:
        """Return a size from what a caller wrote: a width, widths by pattern, a `Size`, or None."""
        return size if isinstance(size, Size) else Size(size)

    @property
    def is_budget(self) -> bool:
        """Whether the widths are to be found."""
        budgets = (self.max_params, self.max_flops, self.latency)
        return any(budget is not None for budget in budgets)

    @property
    def is_given(self) -> bool:
        """Whether another size than a member's may be asked for."""
        return self.width is not None or self.is_budget


def sizes_of(
    graph: CouplingGraph,
    n_members: int,
    width: Width,
    multiple_of: int = 1,
    *,
    at_least_one: bool = False,
) -> Sizes:
    """Return the units of each fused group.

    Args:
        graph: The analysis of the members.
        n_members: N.
        width: In units of a member: 1 is a member's size, N keeps everything. Or a mapping of
            `fnmatch` patterns of `state_dict()` names to widths: a pattern speaks of the coupling
            groups that are named after a tensor it matches, as `CouplingGraph.groups` lists them.
            Groups that no pattern matches keep a member's size.
        multiple_of: The channels of a group are rounded to a multiple of this, if it has as many.
        at_least_one: Whether a group that the width leaves without a unit keeps one.
    """
    widths = {group.name: 1.0 for group in graph.groups}
    if isinstance(width, Mapping):
        widths |= by_pattern(graph, "width", width)
    else:
        widths = dict.fromkeys(widths, float(width))
    for value in widths.values():
        _check(value, n_members)
    return {
        group.name: units_at(
            graph, group, n_members, widths[group.name], multiple_of, least=int(at_least_one)
        )
        for group in graph.groups
    }


def by_pattern(graph: CouplingGraph, option: str, values: Mapping[str, float]) -> dict[str, float]:
    """Return the value of each coupling group that a pattern speaks of."""
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
    multiple_of: int,
    *,
    least: int = 1,
) -> int:
    """Return the units of a group at a width, its channels rounded as in `sizes_of`."""
    most, step = units_in(graph, group, n_members, multiple_of)
    one = most / n_members
    wanted = width * one
    if step > 1:
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


def units_in(
    graph: CouplingGraph, group: CouplingGroup, n_members: int, multiple_of: int
) -> tuple[int, int]:
    """Return the units of all members in a group, and of how many a fused one has a multiple."""
    most = sum(graph.units_of(group.name, member) for member in range(n_members))
    # Units of several channels: heads, groups of a convolution.
    channels = next(rows.shape[1] for rows in group.index.values())
    step = multiple_of // gcd(multiple_of, channels)
    return most, step if step <= most else 1
