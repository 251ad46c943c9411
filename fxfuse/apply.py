"""Maps applied to weights: pure tensor functions, never a block-diagonal matrix over members."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cache
from itertools import combinations
from types import MappingProxyType

import numpy as np
import torch

from fxfuse.combine import Box, Line, Lines, box_of, combined
from fxfuse.coupling import CouplingGraph, CouplingGroup, Index, Place
from fxfuse.layout import Layout, Placements
from fxfuse.plan import FusionPlan, Role, role_of
from fxfuse.ranks import of_each
from fxfuse.scratch import Scratch, zeros


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
    """W_fused = Σ_i M⁽ⁱ⁾ · W_i · U⁽ⁱ⁾ for every tensor (DESIGN.md section 5).

    Args:
        graph: The analysis of the members.
        plan: Groups and maps, which say the sizes as well.
        states: For each member, its tensors by name; of heads, only the member's own.
        layouts: The order of units where the network has another size than a member; the default
            one elsewhere.
        skip: Canonical names of tensors that are left out.

    Returns:
        New tensors by name, in the members' dtype and on the first member's device. Tied names
        share one tensor.
    """
    fusion = _Fusion(graph, plan, states, layouts)
    fused: dict[str, torch.Tensor] = {}
    for name in graph.captured.names:
        first = graph.captured.canonical[name]
        if first in skip:
            continue
        fused[name] = fused[first] if first in fused else fusion.fused(name)
    return fused


class _Fusion:
    """Fuses one tensor after the other; what several have in common is found out once."""

    def __init__(
        self,
        graph: CouplingGraph,
        plan: FusionPlan,
        states: Sequence[Mapping[str, torch.Tensor]],
        layouts: Mapping[Place, Layout],
    ) -> None:
        self._graph, self._plan, self._states = graph, plan, states
        self._placements = Placements(graph, plan, layouts)
        self._lines = Lines(graph)
        self._share, self._apart, self._box = cache(_share), cache(_apart), cache(box_of)
        self._scratch = Scratch()

    def fused(self, name: str) -> torch.Tensor:
        """A tensor of the fused network."""
        plan, states = self._plan, self._states
        role = role_of(self._graph, name)
        owner = self._graph.captured.heads.get(name)
        if role is Role.COPY:
            kept = [plan.host if owner is None else owner]
            ((_, tensor),) = of_each(states, lambda _, state: state[name].detach(), kept)
            return tensor.clone()
        like = states[owner or 0][name]
        placements = [self._placements[name, d] for d in range(like.dim())]
        # Half precision holds weights, not sums of weights.
        dtype = torch.promote_types(like.dtype, torch.float32)
        result = zeros([p.size for p in placements], dtype, like.device)

        @cache
        def contributed(member: int) -> tuple[Line, ...]:
            return self._lines.of(name, placements, member)

        # Of a head, only its member has tensors, and only a member with tensors is asked.
        everyone = range(len(states)) if owner is None else ()
        apart = owner is None and self._apart(tuple(contributed(m) for m in everyone))

        def gathered(member: int, state: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
            if name not in state:
                return None
            tensor = state[name].detach().to(dtype=dtype, device=like.device)
            lines = contributed(member)
            box = self._box(lines)
            cells = result[box] if apart and box is not None else None
            part = combined(lines, tensor, self._scratch, cells)
            share = self._share(lines, role, plan.n_members)
            if share.numel() == 1 and share.item() == 1.0:
                return part
            return part.mul_(share.to(part)) if cells is not None else part * share.to(part)

        # A head's own values come last, over those that stand in where a unit is another member's.
        order, boxes = sorted(range(len(states)), key=lambda m: m == owner), list[Box]()
        for member, part in of_each(states, gathered, order):
            if part is None or (part.numel() == 0 and like.numel()):
                continue
            box = self._box(contributed(member))
            if box is None:
                where = [
                    torch.from_numpy(line.targets).to(like.device) for line in contributed(member)
                ]
                grid = tuple(_along(index, dim, len(where)) for dim, index in enumerate(where))
                result.index_put_(grid, part, accumulate=role is not Role.OWN)
            elif apart and part.data_ptr() == result[box].data_ptr():
                # The common case of whole rows of one member: they were written where they stand.
                continue
            elif role is Role.OWN or not any(_meet(box, other) for other in boxes):
                result[box] = part
            else:
                result[box] += part
            boxes.append(box or tuple(slice(0, p.size) for p in placements))
        return result.to(like.dtype)


def _apart(lines: Sequence[Sequence[Line]]) -> bool:
    """Whether each member contributes to neighbouring cells, and no two to one cell."""
    boxes = [box_of(each) for each in lines]
    found = [box for box in boxes if box is not None]
    return len(found) == len(boxes) and not any(_meet(*pair) for pair in combinations(found, 2))


def _meet(box: Box, other: Box) -> bool:
    """Whether two members contribute to one cell."""
    return all(a.start < b.stop and b.start < a.stop for a, b in zip(box, other, strict=True))


def _share(lines: Sequence[Line], role: Role, n_members: int) -> torch.Tensor:
    """How much of each fused cell is this member's, broadcast over equal cells, float64.

    Along one dimension that is what M gives the member. Of further dimensions that are written only
    the member's own mean is taken, so that the members' shares of a cell sum to one there too.
    """
    rank = len(lines)
    share = np.ones([1] * rank)
    if role is Role.OWN:
        return torch.from_numpy(share)
    if role is Role.MEAN:
        return torch.from_numpy(share / n_members)
    owned = output = hosted = np.zeros([1] * rank, dtype=bool)
    for dim, line in enumerate(lines):
        shape = [-1 if d == dim else 1 for d in range(rank)]
        own, writes, out, host = (values.reshape(shape) for values in line.shares)
        share = np.where(~owned & writes, own, share)
        owned, output, hosted = owned | writes, output | out, hosted | host
    # Where an index means the same to all members, the mean of what they write there is taken, and
    # an output is the mean of theirs; what only the host contributes to is no mean of the members.
    share = np.where(owned & ~output, share, 1.0 / n_members)
    return torch.from_numpy(np.where(hosted, 1.0, share))


def _along(line: torch.Tensor, dim: int, rank: int) -> torch.Tensor:
    return line.reshape([-1 if d == dim else 1 for d in range(rank)])
