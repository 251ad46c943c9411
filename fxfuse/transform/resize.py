"""The sizes of a fused network: from a width or a budget to what can be written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

from fxfuse.analysis.coupling import CouplingGraph
from fxfuse.errors import OptionError
from fxfuse.planning.allocation import Budget
from fxfuse.planning.plan import MixingMode
from fxfuse.planning.widths import Sizes, Width, sizes_of
from fxfuse.transform.cost import operations_of, parameters_of
from fxfuse.transform.resizing import settle

#: Halvings of the range of widths in which a budget is looked for.
_HALVINGS = 12


@dataclass(frozen=True)
class Target:
    """What size a fused network is to have.

    Attributes:
        width: In units of a member, as in `sizes_of`; None: a member's size, or what
            the budget allows.
        max_params: The most parameter elements.
        max_flops: The most floating-point operations for the example inputs.
        round_to: Channels are rounded to multiples of this.
        mixing: How operators that mix members run, as in `Mixing`; None: member by member
            where every unit of every member is kept, and over all units together elsewhere.
        budget: Whether all groups are equally wide.
    """

    width: Width | None = None
    max_params: int | None = None
    max_flops: int | None = None
    round_to: int = 1
    mixing: MixingMode | None = None
    budget: Budget = "local"

    @property
    def is_budget(self) -> bool:
        """Whether the widths are to be found."""
        return self.max_params is not None or self.max_flops is not None

    def excess(self, graph: CouplingGraph, sizes: Sizes) -> str:
        """What a network of these sizes has more of than the budget allows; empty within it."""
        params, flops = self.max_params, self.max_flops
        if params is not None and (found := parameters_of(graph, sizes)) > params:
            return f"has {found:,} parameters"
        if flops is None:
            return ""
        needed = operations_of(graph, sizes)
        if needed is None:
            raise OptionError(
                "max_flops does not work with this network",
                why="shapes in it depend on the values of its inputs, so its operations cannot be "
                "counted beforehand",
                how="use width or max_params instead",
            )
        return (
            f"takes {needed:,} floating-point operations for the example inputs"
            if needed > flops
            else ""
        )


def mixing_of(
    graph: CouplingGraph, n_members: int, target: Target, *, fitted: bool = False
) -> MixingMode:
    """How operators that mix members are to run."""
    if target.mixing not in (None, *get_args(MixingMode)):
        raise OptionError(
            f"unknown mixing {target.mixing!r}",
            how=f"use one of {', '.join(get_args(MixingMode))}, or leave it out",
        )
    obstacle = ""
    if target.width is None:
        obstacle = "it needs a width that keeps every unit of every member"
    elif graph.asked:
        obstacle = f"{next(iter(graph.asked))} is to be one tensor for all members"
    elif fitted:
        obstacle = "the refit fits layers that all members share"
    else:
        least = target.budget == "global"
        wanted = sizes_of(graph, n_members, target.width, target.round_to, at_least_one=least)
        members = range(n_members)
        part = (
            name for name in wanted if wanted[name] < sum(graph.units_of(name, m) for m in members)
        )
        obstacle = next((f"{name} does not keep every unit of every member" for name in part), "")
    if obstacle and target.mixing == "per_member":
        raise OptionError(
            "mixing='per_member' does not work here",
            why=obstacle,
            how=f"use width={n_members} without freeze, share, ignore and refit, or leave "
            "mixing out",
        )
    return target.mixing or ("joint" if obstacle else "per_member")


def resized(
    graph: CouplingGraph,
    n_members: int,
    target: Target,
    mixing: MixingMode = "joint",
    spread: Callable[[Sizes], Sizes] | None = None,
) -> tuple[Sizes, dict[str, str]] | None:
    """The units of each fused group, and why some groups keep a member's size.

    Args:
        graph: The analysis of the members.
        n_members: N.
        target: What is asked for.
        mixing: What `mixing_of` returned: member by member, everything can be written.
        spread: From sizes at which every group is equally wide to those that are wanted
            (`fxfuse.planning.allocation`); None: these.

    Returns:
        None where a member's size is asked for.
    """
    if target.width is None and not target.is_budget:
        return None
    graph.program.require_exported()
    if target.width is None:
        return _within(graph, n_members, target, spread or dict)
    if target.is_budget:
        raise OptionError(
            "width and a budget contradict each other",
            why="max_params and max_flops determine the width",
            how="leave one of them out",
        )
    least = spread is not None
    wanted = sizes_of(graph, n_members, target.width, target.round_to, at_least_one=least)
    if mixing == "per_member":
        return wanted, {}
    return settle(graph, (spread or dict)(wanted))


def _within(
    graph: CouplingGraph, n_members: int, target: Target, spread: Callable[[Sizes], Sizes]
) -> tuple[Sizes, dict[str, str]]:
    """The widest network within a budget."""

    def at(width: float) -> tuple[Sizes, dict[str, str]]:
        wanted = sizes_of(graph, n_members, width, target.round_to, at_least_one=True)
        return settle(graph, spread(wanted))

    low, high = 1e-6, float(n_members)
    best, most = at(low), at(high)
    if not target.excess(graph, most[0]):
        return most
    if excess := target.excess(graph, best[0]):
        raise OptionError(
            "no width meets the budget",
            why=f"the smallest network {excess}",
            how="raise max_params or max_flops to at least that, or use a smaller architecture",
        )
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        found = at(middle)
        if target.excess(graph, found[0]):
            high = middle
        else:
            low, best = middle, found
    return best
