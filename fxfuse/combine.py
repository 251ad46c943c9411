"""What one member contributes along one dimension of a tensor: its units, combined by M or U."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from fxfuse.coupling import CouplingGraph, Index
from fxfuse.labels import Kind
from fxfuse.layout import Placement
from fxfuse.plan import Weights, is_written

#: A matrix with more than this share of its entries listed is multiplied as a dense one.
_DENSE = 0.1


#: Cells that are neighbours in every dimension.
Box = tuple[slice, ...]


@dataclass(frozen=True)
class Line:
    """One member's contribution along one dimension.

    Entry e adds index `sources[e]` of the member, times `weights[e]`, to fused index
    `targets[rows[e]]`.

    Attributes:
        targets: Fused indices that the member contributes to, each once, int64 [t].
        share: How much of each is the member's by M, float64 [t]; 1 where no group writes it.
        owned: Where a group writes, bool [t].
        output: Where the network's output is written, bool [t].
        hosted: What the host keeps, bool [t].
        rows: int64 [e].
        sources: int64 [e].
        weights: float64 [e].
    """

    targets: Index
    share: Weights
    owned: NDArray[np.bool_]
    output: NDArray[np.bool_]
    hosted: NDArray[np.bool_]
    rows: Index
    sources: Index
    weights: Weights

    def combine(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """Dimension `dim` of a member's tensor, of size n, becomes the fused one, of size t.

        A gather where every fused index has one source, a matrix product elsewhere.
        """
        values = torch.from_numpy(self.weights).to(tensor)
        sources = torch.from_numpy(self.sources).to(tensor.device)
        if len(self.targets) == len(self.sources):
            whole = len(self.sources) == tensor.shape[dim] and _is_range(self.sources)
            taken = tensor if whole else tensor.index_select(dim, sources)
            if (self.weights == 1.0).all():
                return taken
            return taken * values.reshape([-1 if d == dim else 1 for d in range(tensor.dim())])
        rows = torch.from_numpy(self.rows).to(tensor.device)
        size = (len(self.targets), tensor.shape[dim])
        places = torch.stack([rows, sources])
        matrix = torch.sparse_coo_tensor(places, values, size, check_invariants=True)
        if len(self.sources) > _DENSE * size[0] * size[1]:
            matrix = matrix.to_dense()
        moved = tensor.movedim(dim, 0)
        product = matrix @ moved.reshape(size[1], -1)
        return product.reshape(size[0], *moved.shape[1:]).movedim(0, dim)


def box_of(lines: Sequence[Line]) -> Box | None:
    """The fused cells that a member contributes to, if they are neighbours in every dimension."""
    if not all(len(line.targets) and _is_range(line.targets) for line in lines):
        return None
    starts = [int(line.targets[0]) for line in lines]
    return tuple(
        slice(start, start + len(line.targets)) for start, line in zip(starts, lines, strict=True)
    )


def _is_range(indices: Index) -> bool:
    """Whether indices follow one another."""
    return bool((np.diff(indices) == 1).all()) and (not len(indices) or bool(indices[0] >= 0))


def lines_of(
    graph: CouplingGraph, name: str, placements: Sequence[Placement], member: int
) -> list[Line]:
    """What a member contributes along each dimension of a tensor.

    Args:
        graph: The analysis of the members.
        name: Name of the tensor.
        placements: Placement of each dimension.
        member: Number of the member.
    """
    graph = graph.of_member(member)
    places = [(name, dim) for dim in range(len(placements))]
    output = any(_kind(graph, place) is Kind.OUTPUT for place in places)
    owned = (place for place in places if place in graph.group_of and is_written(graph, place))
    # A tied weight both writes and reads along a dimension, and can only have one map there: M
    # once, as in W_fused = M W U, and none in an output, where 1/N stands for it.
    leading = None if output else next(owned, None)
    found = []
    for place, placement in zip(places, placements, strict=True):
        key = (graph.captured.canonical[name], place[1])
        unmerges = key in graph.readers and place != leading
        found.append(_line(graph, place, placement, member, unmerges=unmerges))
    return found


def _line(
    graph: CouplingGraph,
    place: tuple[str, int],
    placement: Placement,
    member: int,
    *,
    unmerges: bool,
) -> Line:
    entries, sources = placement.targets[member], placement.sources[member]
    targets, first, rows = np.unique(entries, return_index=True, return_inverse=True)
    if len(targets) == len(entries):
        # As listed, so that a gather needs no sorting.
        targets, first, rows = entries, np.arange(len(entries)), np.arange(len(entries))
    merge = placement.merge[member]
    # Also of no entries at all, which numpy counts in integers.
    share = np.bincount(rows, np.abs(merge), minlength=len(targets)).astype(np.float64)
    # Explicit zeros are no share, and nothing to divide by.
    within = merge / np.where(share, share, 1.0)[rows]
    owned = np.zeros(graph.captured.tensor(place[0]).shape[place[1]], dtype=bool)
    if is_written(graph, place):
        for group in graph.group_of.get(place, ()):
            owned[group.index[place].reshape(-1)] = True
    output, hosted = np.zeros_like(owned), np.zeros_like(owned)
    reason = graph.frozen.get(place)
    if reason is not None:
        output[reason.indices] = reason.kind is Kind.OUTPUT
        hosted[reason.indices] = reason.kind is Kind.HOST
    origin = sources[first]
    weights = placement.unmerge[member] if unmerges else within
    return Line(
        targets, share, owned[origin], output[origin], hosted[origin], rows, sources, weights
    )


def _kind(graph: CouplingGraph, place: tuple[str, int]) -> Kind | None:
    reason = graph.frozen.get(place)
    return None if reason is None else reason.kind
