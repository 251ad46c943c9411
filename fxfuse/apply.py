"""Maps applied to weights: pure tensor functions, never a block-diagonal matrix over members."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fxfuse.combine import Box, Line, box_of, lines_of
from fxfuse.coupling import CouplingGraph, CouplingGroup, Index, Place
from fxfuse.layout import Layout, Placement, copies_of, place_units
from fxfuse.plan import FusionPlan, Role, role_of
from fxfuse.ranks import of_each


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
    return {name: moved_tensor(name, state[name], graph, permutations) for name in state}


def moved_tensor(
    name: str, tensor: torch.Tensor, graph: CouplingGraph, permutations: Mapping[str, Index]
) -> torch.Tensor:
    """One tensor of `permuted`, in any precision: a new one, or itself if no group owns any of it.

    Args:
        name: Its `state_dict()` name.
        tensor: It.
        graph: The analysis of the network.
        permutations: As for `permuted`.
    """
    for dim in range(tensor.dim()):
        source = np.arange(tensor.shape[dim])
        for group in graph.groups:
            if group.name in permutations and (name, dim) in group.index:
                rows = group.index[name, dim]
                source[rows.reshape(-1)] = rows[permutations[group.name]].reshape(-1)
        if (source[1:] < source[:-1]).any():
            tensor = tensor.index_select(dim, torch.from_numpy(source).to(tensor.device))
    return tensor


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


def fused_tensors(
    graph: CouplingGraph,
    plan: FusionPlan,
    states: Sequence[Mapping[str, torch.Tensor]],
    layouts: Mapping[Place, Layout] = MappingProxyType({}),
    skip: Collection[str] = (),
) -> dict[str, torch.Tensor]:
    """`fused_state` at the plan's sizes, in the given layouts (the default one elsewhere)."""
    copies = copies_of(graph, plan.sizes())
    return fused_state(
        graph, plan, states, lambda place: place_units(graph, plan, place, copies, layouts), skip
    )


def fused_state(
    graph: CouplingGraph,
    plan: FusionPlan,
    states: Sequence[Mapping[str, torch.Tensor]],
    place: Callable[[Place], Placement],
    skip: Collection[str] = (),
) -> dict[str, torch.Tensor]:
    """W_fused = Σ_i M⁽ⁱ⁾ · W_i · U⁽ⁱ⁾ for every tensor (DESIGN.md section 5).

    Args:
        graph: The analysis of the members.
        plan: Groups and maps.
        states: For each member, its tensors by name; of heads, only the member's own.
        place: Placement of each dimension.
        skip: Canonical names of tensors that are left out.

    Returns:
        New tensors by name, in the members' dtype and on the first member's device. Tied names
        share one tensor.
    """
    fused: dict[str, torch.Tensor] = {}
    for name in graph.captured.names:
        first = graph.captured.canonical[name]
        if first in skip:
            continue
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
        kept = [plan.host if owner is None else owner]
        ((_, tensor),) = of_each(states, lambda _, state: state[name].detach(), kept)
        return tensor.clone()
    like = states[owner or 0][name]
    placements = [place((name, d)) for d in range(like.dim())]
    # Half precision holds weights, not sums of weights.
    dtype = torch.promote_types(like.dtype, torch.float32)
    result = torch.zeros([p.size for p in placements], dtype=dtype, device=like.device)
    whole, boxes = tuple(slice(0, p.size) for p in placements), list[Box]()

    @cache
    def contributed(member: int) -> list[Line]:
        return lines_of(graph, name, placements, member)

    def gathered(member: int, state: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        if name not in state:
            return None
        part = state[name].detach().to(dtype=dtype, device=like.device)
        for dim, line in enumerate(contributed(member)):
            part = line.combine(part, dim)
        return part

    # A head's own values come last, over those that stand in where a unit is another member's.
    order = sorted(range(len(states)), key=lambda m: m == owner)
    for member, part in of_each(states, gathered, order):
        if part is None or (part.numel() == 0 and like.numel()):
            continue
        lines = contributed(member)
        share = _share(lines, role, plan.n_members)
        if share.numel() > 1 or share.item() != 1.0:
            part = part * share.to(part)
        box = box_of(lines)
        if box is not None and (role is Role.OWN or not any(_meet(box, other) for other in boxes)):
            # The common case of whole rows of one member: nothing is added to anything.
            result[box] = part
        elif box is not None:
            result[box] += part
        else:
            where = [torch.from_numpy(line.targets).to(like.device) for line in lines]
            grid = tuple(_along(index, dim, len(where)) for dim, index in enumerate(where))
            result.index_put_(grid, part, accumulate=role is not Role.OWN)
        boxes.append(box or whole)
    return result.to(like.dtype)


def _meet(box: Box, other: Box) -> bool:
    """Whether two members contribute to one cell."""
    return all(a.start < b.stop and b.start < a.stop for a, b in zip(box, other, strict=True))


def _share(lines: Sequence[Line], role: Role, n_members: int) -> torch.Tensor:
    """How much of each fused cell is this member's, broadcast over equal cells, float64.

    Along one dimension that is what M gives the member. Of further dimensions that are written only
    the member's own mean is taken, so that the members' shares of a cell sum to one there too.
    """
    share = torch.ones([1] * len(lines), dtype=torch.float64)
    if role is Role.OWN:
        return share
    if role is Role.MEAN:
        return share / n_members
    none = torch.zeros([1] * len(lines), dtype=torch.bool)
    owned, output, hosted = none, none, none
    for dim, line in enumerate(lines):

        def along(values: NDArray[Any], dim: int = dim) -> torch.Tensor:
            # What is the same for all indices is said once, and broadcast.
            uniform = len(values) > 0 and bool((values == values[0]).all())
            return _along(torch.from_numpy(values[:1] if uniform else values), dim, len(lines))

        share = torch.where(~owned & along(line.owned), along(line.share), share)
        owned = owned | along(line.owned)
        output = output | along(line.output)
        hosted = hosted | along(line.hosted)
    # Where an index means the same to all members, the mean of what they write there is taken, and
    # an output is the mean of theirs; what only the host contributes to is no mean of the members.
    share = torch.where(owned & ~output, share, 1.0 / n_members)
    return torch.where(hosted, 1.0, share)


def _along(line: torch.Tensor, dim: int, rank: int) -> torch.Tensor:
    return line.reshape([-1 if d == dim else 1 for d in range(rank)])
