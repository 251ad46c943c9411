"""Where the way starts: the best member, members side by side, a member with units of others.

Notation of shapes: n inputs, * any further dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
import torch

from fxfuse.activations.layers import layers_of
from fxfuse.analysis.coupling import CouplingGraph, Index
from fxfuse.errors import RewriteError
from fxfuse.graph.capture import Program
from fxfuse.graph.torch_compat import pytree
from fxfuse.planning.plan import FusionPlan, Mixing, UnitMap
from fxfuse.planning.roles import Role, RoleKind
from fxfuse.refine.judge import Judge, greedy_order
from fxfuse.refine.task import Answer
from fxfuse.transform.emit import FusedModule, emit
from fxfuse.transform.resizing import emit_fused, emit_resized
from fxfuse.transform.sizes import concatenation_plan

State = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Start:
    """A network to go on from.

    Attributes:
        name: What it is.
        plan: Which unit of which member went where.
        module: The network in eval mode.
        members: Numbers of the members that the plan is for; None: all.
        member: Number of the one member that it is; None: it is none.
    """

    name: str
    plan: FusionPlan
    module: FusedModule
    members: tuple[int, ...] | None = None
    member: int | None = None


def members_of(
    graph: CouplingGraph,
    states: Sequence[State],
    others: Mapping[int, Program] = MappingProxyType({}),
) -> list[FusedModule]:
    """The members as networks of their own, which share the given tensors.

    `others` are those of other architectures, by their numbers among all; the result is in the
    order of these numbers.
    """
    own = iter([emit(graph.of_member(i).program, state) for i, state in enumerate(states)])
    return [
        emit(others[number], others[number].state()) if number in others else next(own)
        for number in range(len(states) + len(others))
    ]


def exact_starts(
    graph: CouplingGraph,
    plan: FusionPlan,
    states: Sequence[State],
    judge: Judge,
    numbers: Sequence[int],
) -> Iterator[tuple[Start, float]]:
    """The networks of at most the planned size that answer as members do, nothing fitted.

    One member; and the k members side by side that together are closest to the ensemble, found
    greedily, for each k up to the planned width (Caruana et al., "Ensemble selection from libraries
    of models", ICML 2004, without replacement).

    Args:
        graph: The analysis of the members.
        plan: The plan of the fusion, whose sizes are not exceeded; a member fits (`whole_width`).
        states: The members' tensors by name.
        judge: Knows what the members answer to inputs that do not accept: nothing is fitted here,
            so that these may be those of the fit.
        numbers: The number that each of these members has among all that the judge knows.

    Yields:
        A network, and how far its answers are from the ensemble's, by the members' answers.
    """

    def far(chosen: Sequence[int]) -> float:
        return judge.measured(_mean([judge.asked.members[numbers[i]] for i in chosen])).mean

    order, width = greedy_order(len(states), far), whole_width(graph, plan)
    for member in order if width == 1 or graph.members else order[:1]:
        if _fits(graph, plan, states, member):
            yield _alone(graph, plan, states, member, numbers), far([member])
    for count in range(2, min(width, len(states)) + 1):
        start = _side_by_side(graph, plan, states, sorted(order[:count]), numbers)
        if start is not None:
            yield start, far(order[:count])


def _mean(answers: Sequence[Answer]) -> Answer:
    """What members answer side by side in one network."""
    return pytree.tree_map(lambda *each: torch.stack(each).mean(0), *answers)


def whole_width(graph: CouplingGraph, plan: FusionPlan) -> int:
    """Return how many members fit side by side into the planned sizes."""
    sizes = plan.sizes()
    return min((sizes[g.name] // max(g.n_units, 1) for g in graph.groups), default=0)


def _fits(graph: CouplingGraph, plan: FusionPlan, states: Sequence[State], member: int) -> bool:
    """Whether a member is a network of the analyzed size, without what others have more."""
    if not graph.members:
        return True
    wanted = graph.program.state()
    absent = any(member in numbers for numbers in plan.absent.values())
    return not absent and all(states[member][n].shape == t.shape for n, t in wanted.items())


def _alone(
    graph: CouplingGraph,
    plan: FusionPlan,
    states: Sequence[State],
    member: int,
    numbers: Sequence[int],
) -> Start:
    """A member by itself, with tensors of its own."""
    state = {name: tensor.detach().clone() for name, tensor in states[member].items()}
    found = _all_of(plan, member, {g.name: g.n_units for g in graph.groups})
    return Start(f"member {numbers[member]}", found, emit(graph.program, state), member=member)


def _side_by_side(
    graph: CouplingGraph,
    plan: FusionPlan,
    states: Sequence[State],
    members: Sequence[int],
    numbers: Sequence[int],
) -> Start | None:
    """Members side by side in one network, which is their mean; None where it cannot be written."""
    if graph.members or graph.asked:
        return None
    own = [states[member] for member in members]
    try:
        found = concatenation_plan(graph, own)
        module = emit_resized(graph, found, own)
    except RewriteError:
        return None
    names = ", ".join(str(numbers[member]) for member in members)
    found = replace(found, members=tuple(plan.members[member] for member in members))
    return Start(f"members {names} side by side", found, module, tuple(members))


def fused_start(graph: CouplingGraph, plan: FusionPlan, state: State, name: str) -> Start:
    """The network of the plan, with tensors of its own."""
    own = {key: tensor.detach().clone() for key, tensor in state.items()}
    return Start(name, plan, emit_fused(graph, plan, own))


def grown_start(
    graph: CouplingGraph,
    plan: FusionPlan,
    states: Sequence[State],
    member: int,
    numbers: Sequence[int],
) -> Start | None:
    """A member at a larger size: the units that it does not fill are those of other members.

    At first no output reads what they add, so that the network answers as the member does, unless
    an operator mixes units; training is to make use of them (Chen et al., "Net2Net", ICLR 2016,
    adds units so that the function stays, but copies of the network's own).

    Args:
        graph: The analysis of the members.
        plan: The plan of the fusion: its sizes, and which units of other members come first.
        states: The members' tensors by name.
        member: The member, by its place among these.
        numbers: The number that each of them has among all.

    Returns:
        None where the planned sizes are those of a member, or it cannot be written.
    """
    sizes, own = plan.sizes(), {g.name: g.n_units for g in graph.groups}
    if sizes == own or graph.members or graph.asked or graph.program.heads:
        return None
    maps = []
    for given in plan.maps:
        units = _filled(given, member, plan.n_members, own[given.group])
        taken = UnitMap(given.group, given.n_units, np.arange(len(units)), *units.T)
        maps.append(replace(taken, kept=given.kept))
    found = replace(
        plan,
        maps=tuple(maps),
        constraints=replace(plan.constraints, base_member=member),
        mixing=Mixing(notes=plan.mixing.notes),
    )
    try:
        module = emit_resized(graph, found, _silenced(graph, states, member))
    except RewriteError:
        return None
    return Start(f"member {numbers[member]} with units of others", found, module)


def _filled(given: UnitMap, member: int, n_members: int, n_units: int) -> Index:
    """The units of a member, and after them of others, as (member, unit): int64 [fused units, 2].

    Of the others, those that the plan takes come first.
    """
    every = np.stack(np.meshgrid(np.arange(n_members), np.arange(n_units), indexing="ij"), -1)
    order = np.concatenate([given.units(), every.reshape(-1, 2)])
    _, first = np.unique(order, axis=0, return_index=True)
    order = order[np.sort(first)]
    own = order[:, 0] == member
    result: Index = np.concatenate([order[own], order[~own]])[: given.n_units]
    return result


def _silenced(graph: CouplingGraph, states: Sequence[State], member: int) -> list[State]:
    """The members' tensors so that their mean at the outputs is what one member answers."""
    program, owned = graph.program, {name for name, _ in graph.group_of}
    common = [name for name in program.names if program.canonical[name] not in owned]
    heads = [
        layer.weight
        for layer in layers_of(program)
        if (layer.weight, layer.facts.outputs) not in graph.group_of and layer.weight in owned
    ]
    result: list[State] = []
    for number, state in enumerate(states):
        own = dict(state) | {name: states[member][name] for name in common}
        for name in heads:
            own[name] = state[name] * (len(states) if number == member else 0)
        result.append(own)
    return result


def _all_of(plan: FusionPlan, member: int, sizes: Mapping[str, int]) -> FusionPlan:
    """The plan that takes every unit from one member."""
    maps = tuple(
        UnitMap(
            m.group,
            sizes[m.group],
            np.arange(sizes[m.group]),
            np.full(sizes[m.group], member),
            np.arange(sizes[m.group]),
        )
        for m in plan.maps
    )
    # It is that member, so nothing in it is averaged or another's.
    mixed = (RoleKind.AVERAGED, RoleKind.BASE)
    roles = {
        name: Role(RoleKind.MAPPED, absent_in=role.absent_in) if role.kind in mixed else role
        for name, role in plan.roles.items()
    }
    return replace(
        plan,
        maps=maps,
        roles=roles,
        constraints=replace(plan.constraints, base_member=member),
        mixing=Mixing(plan.mixing.mode),
    )
