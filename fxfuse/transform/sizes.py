"""The plan of a method at the sizes that are asked for."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from fxfuse.analysis.coupling import CouplingGraph
from fxfuse.errors import OptionError, RewriteError
from fxfuse.planning.allocation import errors_of, spread
from fxfuse.planning.context import Context, State
from fxfuse.planning.methods import Concatenate, Method, Transplant
from fxfuse.planning.plan import FusionPlan
from fxfuse.planning.planner import make_plan
from fxfuse.planning.roles import kept_per_member
from fxfuse.planning.size import MixingMode, Size, Sizes, sizes_of, units_in
from fxfuse.transform.cost import operations_of, parameters_of
from fxfuse.transform.resizing import apart_names, limit_sizes

#: From sizes at which every group is equally wide, and why some cannot change, to those wanted.
Allocate = Callable[[Sizes, dict[str, str]], tuple[Sizes, dict[str, str]]]

#: Halvings of the range of widths in which a budget is looked for.
_HALVINGS = 12


def make_sized_plan(
    graph: CouplingGraph,
    states: Sequence[State],
    method: Method,
    context: Context,
    size: Size,
    *,
    fitted: bool = False,
) -> FusionPlan:
    """Find the units of each fused group, and ask the method for its maps at these sizes.

    `fitted` says whether layers will be fitted, to units of all members.
    """
    if isinstance(method, Concatenate):
        size = replace(size, width=_width_of_all(size, len(states)))
    mixing = choose_mixing(graph, len(states), size, fitted=fitted)
    found = find_sizes(
        graph, len(states), size, mixing, _allocation(graph, states, method, context, size)
    )
    sizes, kept = found or (None, {})
    if sizes is not None:
        _check_resizable(sizes, graph, method)
    plan = None
    if mixing == "per_member":
        try:
            plan = concatenation_plan(graph, states, absent=context.absent)
        except RewriteError:
            # Heads may begin before the last operator that mixes members.
            if size.mixing or not graph.program.heads:
                raise
    if plan is None:
        plan = make_plan(graph, states, method, replace(context, sizes=sizes))
    told = {} if size.allocation == "uniform" else {"allocation": size.allocation}
    maps = tuple(replace(m, kept=kept.get(m.group, "")) for m in plan.maps)
    return replace(plan, maps=maps, options={**plan.options, **told})


def concatenation_plan(
    graph: CouplingGraph,
    states: Sequence[State],
    mixing: MixingMode = "per_member",
    *,
    absent: Mapping[str, Collection[int]] = MappingProxyType({}),
) -> FusionPlan:
    """Make the plan that keeps every unit of every member."""
    plan = make_plan(graph, states, Concatenate(), Context(absent=absent))
    if mixing == "joint":
        return plan
    plan = replace(plan, mixing=replace(plan.mixing, mode=mixing))
    return replace(plan, roles=kept_per_member(plan.roles, apart_names(graph, plan)))


def choose_mixing(
    graph: CouplingGraph, n_members: int, size: Size, *, fitted: bool = False
) -> MixingMode:
    """Decide how operators that mix members are to run.

    Fitted layers are fitted to units of all members, so they do not run member by member.
    """
    obstacle = ""
    if size.width is None:
        obstacle = "it needs a width that keeps every unit of every member"
    elif graph.asked:
        obstacle = f"{next(iter(graph.asked))} is to be one tensor for all members"
    elif fitted:
        obstacle = "the refit fits layers that all members share"
    else:
        obstacle = _not_kept(graph, n_members, size)
    if obstacle and size.mixing == "per_member":
        raise OptionError(
            "mixing='per_member' does not work here",
            why=obstacle,
            how=f"use width={n_members} without freeze, share, ignore and refine, or leave "
            "mixing out",
        )
    return size.mixing or ("joint" if obstacle else "per_member")


def _not_kept(graph: CouplingGraph, n_members: int, size: Size) -> str:
    """Say of which group not every unit of every member is kept; empty where all are."""
    assert size.width is not None
    wanted = sizes_of(
        graph, n_members, size.width, size.multiple_of, at_least_one=size.allocation == "auto"
    )
    members = range(n_members)
    part = (n for n in wanted if wanted[n] < sum(graph.units_of(n, m) for m in members))
    return next((f"{name} does not keep every unit of every member" for name in part), "")


def find_sizes(
    graph: CouplingGraph,
    n_members: int,
    size: Size,
    mixing: MixingMode = "joint",
    allocate: Allocate | None = None,
) -> tuple[Sizes, dict[str, str]] | None:
    """Find the units of each fused group, and why some groups keep a member's size.

    None where a member's size is asked for. `allocate` turns sizes at which every group is equally
    wide into those that are wanted.
    """
    if not size.is_given:
        return None
    graph.program.require_exported()
    if size.width is None:
        found = _within(graph, n_members, size)
    else:
        wanted = sizes_of(
            graph, n_members, size.width, size.multiple_of, at_least_one=allocate is not None
        )
        if mixing == "per_member":
            return wanted, {}
        found = limit_sizes(graph, wanted)
    return found if allocate is None else allocate(*found)


def _within(graph: CouplingGraph, n_members: int, size: Size) -> tuple[Sizes, dict[str, str]]:
    """Return the widest network within a budget, all groups equally wide."""

    def at(width: float) -> tuple[Sizes, dict[str, str]]:
        wanted = sizes_of(graph, n_members, width, size.multiple_of, at_least_one=True)
        return limit_sizes(graph, wanted)

    low, high = 1e-6, float(n_members)
    best, most = at(low), at(high)
    if not _excess(graph, most[0], size):
        return most
    if excess := _excess(graph, best[0], size):
        raise OptionError(
            "no width meets the budget",
            why=f"the smallest network {excess}",
            how="raise max_params or max_flops to at least that, or use a smaller architecture",
        )
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        found = at(middle)
        if _excess(graph, found[0], size):
            high = middle
        else:
            low, best = middle, found
    return best


def _excess(graph: CouplingGraph, sizes: Sizes, size: Size) -> str:
    """Return what a network of these sizes has more of than the budget allows; empty within it."""
    params, flops = size.max_params, size.max_flops
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


def _allocation(
    graph: CouplingGraph, states: Sequence[State], method: Method, context: Context, size: Size
) -> Allocate | None:
    """Return how sizes are spread over the groups, where not uniformly."""
    if size.allocation == "uniform":
        return None
    score = (method.score if isinstance(method, Transplant) else None) or "l2"

    def allocate(uniform: Sizes, kept: dict[str, str]) -> tuple[Sizes, dict[str, str]]:
        errors = errors_of(graph.trunk(), states, score, replace(context, sizes=uniform))
        free = [g for g in graph.groups if g.name in errors and g.name not in kept]
        steps = {g.name: units_in(graph, g, len(states), size.multiple_of)[1] for g in free}
        cost = _share_of_budget(graph, size, uniform)
        wanted = spread({g.name: errors[g.name] for g in free}, uniform, steps, cost)
        found = limit_sizes(graph, wanted)
        return found if cost(found[0]) <= 1 else (uniform, kept)

    return allocate


def _share_of_budget(graph: CouplingGraph, size: Size, uniform: Sizes) -> Callable[[Sizes], float]:
    """Return what a network of some sizes costs, as a share of the budget: of the tighter one.

    A width has the budget that a network of this width needs.
    """
    params = parameters_of(graph, uniform) if size.max_flops is None else None
    params = size.max_params or params

    def share(sizes: Sizes) -> float:
        shares = [] if params is None else [parameters_of(graph, sizes) / params]
        if size.max_flops is not None:
            shares.append((operations_of(graph, sizes) or 0) / size.max_flops)
        return max(shares)

    known: dict[tuple[int, ...], float] = {}

    def cost(sizes: Sizes) -> float:
        key = tuple(sizes.values())
        if key not in known:
            known[key] = share(sizes)
        return known[key]

    return cost


def _width_of_all(size: Size, n_members: int) -> float:
    if size.width not in (None, n_members):
        raise OptionError(
            f"width={size.width} and method='concatenate' contradict each other",
            why=f"the method keeps every unit of every member, which is width {n_members}",
            how="leave width out, or use method='transplant'",
        )
    return float(n_members)


def _check_resizable(sizes: Sizes, graph: CouplingGraph, method: Method) -> None:
    """Check that a method works at another size than a member's."""
    if method.any_size or all(sizes[group.name] == group.n_units for group in graph.groups):
        return
    raise OptionError(
        f"method {method.name!r} works at a member's width only",
        why="it puts every fused unit in the place of a unit of the reference member",
        how="leave the size out, or use method='transplant' or 'zip'",
    )
