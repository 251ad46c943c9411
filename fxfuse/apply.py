"""Maps applied to weights: pure tensor functions, gathers only, never a block-diagonal matrix."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from fxfuse.coupling import CouplingGraph, CouplingGroup, Index, Place
from fxfuse.labels import Kind
from fxfuse.layout import Layout, Placement, place_copies, place_units
from fxfuse.plan import FusionPlan, Role, is_written, own_indices, role_of


def permuted(
    state: Mapping[str, torch.Tensor],
    graph: CouplingGraph,
    permutations: Mapping[str, Index],
) -> dict[str, torch.Tensor]:
    """Moves units: unit `permutations[group][k]` of the old network becomes unit k of the new one.

    Args:
        state: Tensors by `state_dict()` name.
        graph: The analysis of the network.
        permutations: For each group name, int64 [n_units].

    Returns:
        New tensors; those that no group owns are the old ones. The function of the network is
        unchanged (DESIGN.md section 7, permutation oracle).
    """
    result = dict(state)
    groups = {group.name: group for group in graph.groups}
    for name, permutation in permutations.items():
        for (tensor, dim), rows in groups[name].index.items():
            source = np.arange(state[tensor].shape[dim])
            source[rows.reshape(-1)] = rows[permutation].reshape(-1)
            index = torch.from_numpy(source).to(result[tensor].device)
            result[tensor] = result[tensor].index_select(dim, index)
    return result


def random_permutations(
    groups: Sequence[CouplingGroup], generator: np.random.Generator
) -> dict[str, Index]:
    """A random permutation for each group, never the identity where there are two units or more."""
    moves = {}
    for group in groups:
        move = generator.permutation(group.n_units)
        # A group of two would be left alone half the time, and an oracle would learn nothing.
        moves[group.name] = np.roll(move, 1) if (move == np.arange(group.n_units)).all() else move
    return moves


def fused_at_width(
    graph: CouplingGraph, plan: FusionPlan, states: Sequence[Mapping[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """`fused_state` at the members' width."""
    return fused_state(graph, plan, states, lambda place: place_units(graph, plan, place))


def fused_side_by_side(
    graph: CouplingGraph,
    plan: FusionPlan,
    states: Sequence[Mapping[str, torch.Tensor]],
    layouts: Mapping[Place, Layout],
) -> dict[str, torch.Tensor]:
    """`fused_state` of the concatenation, in the given layouts (the default one elsewhere)."""
    return fused_state(graph, plan, states, lambda place: place_copies(graph, plan, place, layouts))


def fused_state(
    graph: CouplingGraph,
    plan: FusionPlan,
    states: Sequence[Mapping[str, torch.Tensor]],
    place: Callable[[Place], Placement],
) -> dict[str, torch.Tensor]:
    """W_fused = Σ_i M⁽ⁱ⁾ · W_i · U⁽ⁱ⁾ for every tensor (DESIGN.md section 5).

    Args:
        graph: The analysis of the members.
        plan: Groups and maps.
        states: For each member, its tensors by name; of heads, only the member's own.
        place: Placement of each dimension.

    Returns:
        New tensors by name, in the members' dtype and on the first member's device. Tied names
        share one tensor.
    """
    fused: dict[str, torch.Tensor] = {}
    for name in graph.captured.names:
        first = graph.captured.canonical[name]
        fused[name] = fused[first] if first in fused else _fused(graph, plan, states, place, name)
    return fused


def _fused(
    graph: CouplingGraph,
    plan: FusionPlan,
    states: Sequence[Mapping[str, torch.Tensor]],
    place: Callable[[Place], Placement],
    name: str,
) -> torch.Tensor:
    role = role_of(graph, name)
    owner = graph.captured.heads.get(name)
    if role is Role.COPY:
        return states[plan.host if owner is None else owner][name].detach().clone()
    like = states[owner or 0][name]
    placements = [place((name, d)) for d in range(like.dim())]
    # Half precision holds weights, not sums of weights.
    dtype = torch.promote_types(like.dtype, torch.float32)
    result = torch.zeros([p.size for p in placements], dtype=dtype, device=like.device)
    # A head's own values come last, over those that stand in where a unit is another member's.
    for member in sorted(range(len(states)), key=lambda m: m == owner):
        if name not in states[member]:
            continue
        part = states[member][name].detach().to(dtype=dtype, device=like.device)
        for dim, p in enumerate(placements):
            part = part.index_select(dim, torch.from_numpy(p.sources[member]).to(like.device))
        if part.numel() == 0 and like.numel():
            continue
        where = [torch.from_numpy(p.targets[member]).to(like.device) for p in placements]
        grid = tuple(_along(index, dim, len(where)) for dim, index in enumerate(where))
        if grid:
            share = _share(graph, plan, name, role, [p.sources[member] for p in placements])
            result.index_put_(grid, part * share.to(part), accumulate=role is not Role.OWN)
        else:
            result = part if role is Role.OWN else result + part * _weight(graph, plan, name, role)
    return result.to(like.dtype)


def _along(line: torch.Tensor, dim: int, rank: int) -> torch.Tensor:
    return line.reshape([-1 if d == dim else 1 for d in range(rank)])


def _share(
    graph: CouplingGraph, plan: FusionPlan, name: str, role: Role, sources: Sequence[Index]
) -> torch.Tensor:
    """The weight of each cell of one member's contribution, broadcast over equal ones, float64."""
    rank = len(sources)
    share = torch.full([1] * rank, _weight(graph, plan, name, role), dtype=torch.float64)
    if role is not Role.SUM:
        return share
    told, hosted = torch.zeros([1] * rank, dtype=torch.bool), torch.zeros([1] * rank).bool()
    for dim, indices in enumerate(sources):
        told = told | _along(torch.from_numpy(own_indices(graph, (name, dim))[indices]), dim, rank)
        reason = graph.frozen.get((name, dim))
        if reason is not None and reason.kind is Kind.HOST:
            mine = torch.from_numpy(np.isin(indices, reason.indices))
            hosted = hosted | _along(mine, dim, rank)
    # Where an index means the same to all members, the mean of what they write there is taken;
    # what only the host contributes to is no mean of the members.
    share = torch.where(told, share, 1.0 / plan.n_members)
    return torch.where(hosted, 1.0, share)


def _weight(graph: CouplingGraph, plan: FusionPlan, name: str, role: Role) -> float:
    """The weight of one member's contribution: the product of its M along written dimensions."""
    if role is Role.MEAN:
        return 1.0 / plan.n_members
    if role is Role.OWN:
        return 1.0
    is_output, weights = False, []
    for dim in range(graph.captured.tensor(name).dim()):
        reason = graph.frozen.get((name, dim))
        is_output |= reason is not None and reason.kind is Kind.OUTPUT
        if is_written(graph, (name, dim)):
            weights += [plan.map_of(g.name).weight for g in graph.group_of.get((name, dim), ())]
    if is_output:
        return 1.0 / plan.n_members
    return weights[0] if weights else 1.0
