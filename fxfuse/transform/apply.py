"""Maps applied to weights: pure tensor functions, never a block-diagonal matrix over members."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cache
from itertools import combinations
from types import MappingProxyType

import numpy as np
import torch

from fxfuse.analysis.coupling import CouplingGraph, CouplingGroup, Index, Place
from fxfuse.common.scratch import Scratch, zeros
from fxfuse.members.ranks import of_each
from fxfuse.planning.plan import FusionPlan
from fxfuse.planning.roles import Combination, combination_of
from fxfuse.transform.combine import Box, DimContribution, Lines, box_of, combined
from fxfuse.transform.layout import Layout, Placements


def permuted(
    state: Mapping[str, torch.Tensor],
    graph: CouplingGraph,
    permutations: Mapping[str, Index],
) -> dict[str, torch.Tensor]:
    """Move units: unit `permutations[group][k]` of the old network becomes unit k of the new one.

    Tensors that no group owns are the old ones. The function of the network is unchanged (DESIGN.md
    section 7, permutation oracle).
    """
    return {name: moved_tensor(name, state[name], graph, permutations) for name in state}


def moved_tensor(
    name: str, tensor: torch.Tensor, graph: CouplingGraph, permutations: Mapping[str, Index]
) -> torch.Tensor:
    """Return one tensor of `permuted`, in any precision; itself if no group owns any of it."""
    for dim in range(tensor.dim()):
        source = np.arange(tensor.shape[dim])
        for group in graph.group_of.get((name, dim), ()):
            if group.name in permutations:
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
    for name in graph.program.names:
        first = graph.program.canonical[name]
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
        """Return a tensor of the fused network."""
        plan, states = self._plan, self._states
        combination = combination_of(self._graph, name)
        owner = self._graph.program.heads.get(name)
        if combination is Combination.COPY:
            kept = [plan.base_member if owner is None else owner]
            ((_, tensor),) = of_each(states, lambda _, state: state[name].detach(), kept)
            return tensor.clone()
        like = states[owner or 0][name]
        given, device, rank, empty = like.dtype, like.device, like.dim(), not like.numel()
        # A tensor that is made for being read is not to be kept.
        del like
        placements = [self._placements[name, d] for d in range(rank)]
        # Half precision holds weights, not sums of weights.
        dtype = torch.promote_types(given, torch.float32)
        result = _Result(zeros([p.size for p in placements], dtype, device), combination)

        @cache
        def contributed(member: int) -> tuple[DimContribution, ...]:
            return self._lines.of(name, placements, member)

        # Only the member whose head it is has a tensor of a head, and only with it there are lines.
        everyone = range(len(states)) if owner is None else ()
        apart = owner is None and self._apart(tuple(contributed(m) for m in everyone))

        def gathered(member: int, state: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
            if name not in state:
                return None
            lines = contributed(member)
            cells = result.cells[self._box(lines)] if apart else None
            tensor = state[name].detach().to(dtype=dtype, device=device)
            part = combined(lines, tensor, self._scratch, cells)
            share = self._share(lines, combination, plan.n_members)
            if share.numel() == 1 and share.item() == 1.0:
                return part
            return part.mul_(share.to(part)) if apart else part * share.to(part)

        # A head's own values come last, over those that stand in where a unit is another member's.
        order = sorted(range(len(states)), key=lambda m: m == owner)
        for member, part in of_each(states, gathered, order):
            if part is not None and (part.numel() or empty):
                lines = contributed(member)
                result.put(part, lines, self._box(lines))
        return result.cells.to(given)


class _Result:
    """A fused tensor, to which one member after the other contributes."""

    def __init__(self, cells: torch.Tensor, combination: Combination) -> None:
        self.cells, self._combination = cells, combination
        self._boxes = list[Box]()

    def put(self, part: torch.Tensor, lines: Sequence[DimContribution], box: Box | None) -> None:
        """Add what a member contributes, unless it was written where it stands."""
        if box is None:
            where = [torch.from_numpy(line.targets).to(part.device) for line in lines]
            grid = tuple(lay_along(index, dim, len(where)) for dim, index in enumerate(where))
            self.cells.index_put_(grid, part, accumulate=self._combination is not Combination.OWN)
        elif part.data_ptr() == self.cells[box].data_ptr():
            pass
        elif self._combination is Combination.OWN or not any(
            _meet(box, other) for other in self._boxes
        ):
            # The common case of whole rows of one member: nothing is added to anything.
            self.cells[box] = part
        else:
            self.cells[box] += part
        self._boxes.append(box or tuple(slice(0, size, 1) for size in self.cells.shape))


def _apart(lines: Sequence[Sequence[DimContribution]]) -> bool:
    """Tell whether each member contributes to evenly spaced cells, and no two to one cell."""
    boxes = [box_of(each) for each in lines]
    found = [box for box in boxes if box is not None]
    return len(found) == len(boxes) and not any(_meet(*pair) for pair in combinations(found, 2))


def _meet(box: Box, other: Box) -> bool:
    """Tell whether two members may contribute to one cell."""
    return all(_overlap(a, b) for a, b in zip(box, other, strict=True))


def _overlap(a: slice, b: slice) -> bool:
    if a.start >= b.stop or b.start >= a.stop:
        return False
    # Those that are spaced alike may lie between one another: the copies of units in a wide layer.
    return a.step != b.step or bool((a.start - b.start) % a.step == 0)


def _share(
    lines: Sequence[DimContribution], combination: Combination, n_members: int
) -> torch.Tensor:
    """Return how much of each fused cell is this member's, broadcast over equal cells, float64.

    Along one dimension that is what M gives the member. Of further dimensions that are written only
    the member's own mean is taken, so that the members' shares of a cell sum to one there too.
    """
    rank = len(lines)
    share = np.ones([1] * rank)
    if combination is Combination.OWN:
        return torch.as_tensor(share)
    if combination is Combination.MEAN:
        return torch.as_tensor(share / n_members)
    owned = output = hosted = np.zeros([1] * rank, dtype=bool)
    for dim, line in enumerate(lines):
        shape = [-1 if d == dim else 1 for d in range(rank)]
        own, writes, out, base_member = (values.reshape(shape) for values in line.shares)
        share = np.where(~owned & writes, own, share)
        owned, output, hosted = owned | writes, output | out, hosted | base_member
    # Where an index means the same to all members, the mean of what they write there is taken, and
    # an output is the mean of theirs; what only the base member contributes to is no mean of the
    # members.
    share = np.where(owned & ~output, share, 1.0 / n_members)
    # Of a tensor without dimensions numpy returns a number.
    return torch.as_tensor(np.where(hosted, 1.0, share))


def lay_along(line: torch.Tensor, dim: int, rank: int) -> torch.Tensor:
    """View a line [n] as a tensor of `rank` dimensions, along one of them."""
    return line.reshape([-1 if d == dim else 1 for d in range(rank)])
