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
from fxfuse.transform.cost import Latency, operations_of, parameters_of
from fxfuse.transform.resizing import apart_names, limit_sizes

#: Units of each fused group, and why some groups keep a member's size.
Found = tuple[Sizes, dict[str, str]]
#: From sizes at which every group is equally wide, and why some cannot change, to those wanted.
Allocate = Callable[[Sizes, dict[str, str]], Found]

#: Halvings of the range of widths in which a budget is looked for, and its lower end.
_HALVINGS, _LEAST = 12, 1e-6
#: How often a network is measured at most, and which share of a latency is near enough to it.
_ROUNDS, _NEAR = 6, 0.96
#: With a latency, into how many steps a group is divided, and over how many its price is looked up:
#: one unit more or less cannot be timed.
_STEPS, _REACH = 16, 4
#: What a network has too much of.
_COSTS = {
    "max_params": "has {:,} parameters",
    "max_flops": "takes {:,} floating-point operations for the example inputs",
}


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
) -> Found | None:
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


def _within(graph: CouplingGraph, n_members: int, size: Size) -> Found:
    """Return the widest network within a budget, all groups equally wide."""

    def at(width: float) -> Found:
        wanted = sizes_of(graph, n_members, width, size.multiple_of, at_least_one=True)
        return limit_sizes(graph, wanted)

    budget = _Budget(graph, size)
    least, most = at(_LEAST), at(float(n_members))
    if excess := budget.excess(least[0]):
        fixed = ", and no group can change its size" if least[0] == most[0] else ""
        raise OptionError(
            "no width meets the budget",
            why=f"the smallest network {excess}{fixed}",
            how="raise max_params, max_flops or latency to at least that, or use a smaller "
            "architecture",
        )

    def widest() -> Found:
        if budget.share(most[0]) <= 1:
            return most
        low, high, best = _LEAST, float(n_members), least
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            found = at(middle)
            share = budget.share(found[0])
            if share > 1:
                high = middle
                continue
            low, best = middle, found
            if size.latency is not None and share >= _NEAR:
                break
        return best

    return budget.met(widest, at(1.0)[0]) or least


def _allocation(
    graph: CouplingGraph, states: Sequence[State], method: Method, context: Context, size: Size
) -> Allocate | None:
    """Return how sizes are spread over the groups, where not uniformly."""
    if size.allocation == "uniform":
        return None
    score = (method.score if isinstance(method, Transplant) else None) or "l2"

    def allocate(uniform: Sizes, kept: dict[str, str]) -> Found:
        errors = errors_of(graph.trunk(), states, score, replace(context, sizes=uniform))
        free = [g for g in graph.groups if g.name in errors and g.name not in kept]
        errors = {g.name: errors[g.name] for g in free}
        steps = {g.name: units_in(graph, g, len(states), size.multiple_of)[1] for g in free}
        reach = 1
        if size.latency is not None:
            # One unit more or less cannot be timed.
            steps = {
                n: max(step, len(errors[n]) // _STEPS // step * step) for n, step in steps.items()
            }
            reach = _REACH
        params = parameters_of(graph, uniform) if size.width is not None else None
        budget = _Budget(graph, size, params)

        def spread_out() -> Found:
            wanted = spread(errors, uniform, steps, budget.share, reach)
            found = limit_sizes(graph, wanted)
            return found if budget.share(found[0]) <= 1 else (uniform, kept)

        return budget.met(spread_out, uniform) or (uniform, kept)

    return allocate


class _Budget:
    """What a network may cost.

    A latency is predicted by a table of operators, since two networks of nearly the same sizes
    differ by less than a measurement of either is off. The table leaves out what is around
    operators, so a network that was found is measured, the prediction is scaled, and another one
    is looked for.
    """

    def __init__(self, graph: CouplingGraph, size: Size, params: int | None = None) -> None:
        """Take the budgets of a size; `params` is that of a width."""
        limits = {"max_params": size.max_params or params, "max_flops": size.max_flops}
        self.limits: dict[str, float] = {n: x for n, x in limits.items() if x is not None}
        self.graph, self.target = graph, size.latency
        self._latency = Latency(graph, size.batch)
        #: How much longer a network takes than its operators.
        self._scale = 1.0
        self._known: dict[tuple[object, ...], int] = {}

    def share(self, sizes: Sizes) -> float:
        """Return what a network of some sizes costs, as a share of the tightest budget."""
        shares = [self._needed(name, sizes) / limit for name, limit in self.limits.items()]
        if self.target is not None:
            shares.append(self._scale * self._latency.of_operators(sizes) / self.target)
        return max(shares)

    def excess(self, sizes: Sizes) -> str:
        """Say what a network has more of than the budget allows; empty within it."""
        for name, limit in self.limits.items():
            if (needed := self._needed(name, sizes)) > limit:
                return _COSTS[name].format(needed)
        if self.target is not None and (took := self._latency.of_network(sizes)) > self.target:
            return f"takes {took:.3g} ms"
        return ""

    def met(self, search: Callable[[], Found], start: Sizes) -> Found | None:
        """Search for sizes until those that were found meet the latency; None if none do.

        `start` are sizes at which the first search learns what a network takes.
        """
        if self.target is None:
            return search()
        took = self._latency.of_network(start)
        self._scale = took / max(self._latency.of_operators(start), 1e-9)
        best, most = None, 0.0
        for _ in range(_ROUNDS):
            found = search()
            took = self._latency.of_network(found[0])
            if most < took <= self.target:
                best, most = found, took
            if _NEAR <= took / self.target <= 1:
                break
            # Also where the table is wrong about the next larger network, so that it comes next.
            self._scale *= took / self.target
        return best

    def _needed(self, name: str, sizes: Sizes) -> int:
        key = (name, *sizes.values())
        if key not in self._known:
            count = parameters_of if name == "max_params" else operations_of
            needed = count(self.graph, sizes)
            if needed is None:
                raise OptionError(
                    "max_flops does not work with this network",
                    why="shapes in it depend on the values of its inputs, so its operations cannot "
                    "be counted beforehand",
                    how="use width, max_params or latency instead",
                )
            self._known[key] = needed
        return self._known[key]


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
