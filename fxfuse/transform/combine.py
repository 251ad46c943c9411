"""What one member contributes along one dimension of a tensor: its units, combined by M or U."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from fxfuse.analysis.coupling import CouplingGraph, Index, Place
from fxfuse.analysis.labels import Kind
from fxfuse.common.scratch import BLOCK, Scratch
from fxfuse.planning.plan import Weights
from fxfuse.planning.roles import is_written
from fxfuse.transform.layout import Placement

#: A matrix with more than this share of its entries listed is multiplied as a dense one.
_DENSE = 0.1


#: Cells that are evenly spaced in each dimension.
Box = tuple[slice, ...]


# By identity: two that are equal are one object, and what is known of it is known of both.
@dataclass(frozen=True, eq=False)
class DimContribution:
    """One member's contribution along one dimension.

    Entry e adds index `sources[e]` of the member, times `weights[e]`, to fused index
    `targets[rows[e]]`.

    Attributes:
        targets: Fused indices that the member contributes to, each once, int64 [t].
        share: How much of each is the member's by M, float64 [t]; 1 where no group writes it.
        owned: Where a group writes, bool [t].
        output: Where the network's output is written, bool [t].
        hosted: What the base member keeps, bool [t].
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

    @cached_property
    def is_gather(self) -> bool:
        """Whether every fused index is one of the member's, and nothing else."""
        return len(self.targets) == len(self.sources) and bool((self.weights == 1.0).all())

    @cached_property
    def span(self) -> slice | None:
        """The fused indices, if they are evenly spaced; an empty slice if there are none."""
        if not len(self.targets):
            return slice(0, 0, 1)
        steps = np.diff(self.targets)
        step = int(steps[0]) if len(steps) else 1
        if step < 1 or self.targets[0] < 0 or (steps != step).any():
            return None
        return slice(int(self.targets[0]), int(self.targets[-1]) + 1, step)

    @cached_property
    def shares(self) -> tuple[NDArray[Any], ...]:
        """`share`, `owned`, `output`, `hosted`; what is the same for all indices is said once."""
        return tuple(
            values[:1] if len(values) and bool((values == values[0]).all()) else values
            for values in (self.share, self.owned, self.output, self.hosted)
        )

    def index(self, tensor: torch.Tensor, dim: int) -> torch.Tensor | None:
        """The sources for `index_select` on a dimension of a tensor; None: all, as they are."""
        if len(self.sources) == tensor.shape[dim] and self._in_a_row:
            return None
        return self._index.to(tensor.device)

    @cached_property
    def _in_a_row(self) -> bool:
        return _is_range(self.sources) and (not len(self.sources) or self.sources[0] == 0)

    @cached_property
    def _index(self) -> torch.Tensor:
        return torch.from_numpy(self.sources)

    def combine(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """Dimension `dim` of a member's tensor, of size n, becomes the fused one, of size t.

        A gather where every fused index has one source, a matrix product elsewhere.
        """
        if len(self.targets) == len(self.sources):
            index = self.index(tensor, dim)
            taken = tensor if index is None else tensor.index_select(dim, index)
            if self.is_gather:
                return taken
            values = torch.from_numpy(self.weights).to(tensor)
            return taken * values.reshape([-1 if d == dim else 1 for d in range(tensor.dim())])
        values = torch.from_numpy(self.weights).to(tensor)
        sources = torch.from_numpy(self.sources).to(tensor.device)
        rows = torch.from_numpy(self.rows).to(tensor.device)
        size = (len(self.targets), tensor.shape[dim])
        places = torch.stack([rows, sources])
        matrix = torch.sparse_coo_tensor(places, values, size, check_invariants=True)
        if len(self.sources) > _DENSE * size[0] * size[1]:
            matrix = matrix.to_dense()
        moved = tensor.movedim(dim, 0)
        product = matrix @ moved.reshape(size[1], -1)
        return product.reshape(size[0], *moved.shape[1:]).movedim(0, dim)


def box_of(lines: Sequence[DimContribution]) -> Box | None:
    """The fused cells that a member contributes to, if they are evenly spaced in each dimension."""
    spans = [line.span for line in lines]
    found = tuple(span for span in spans if span is not None)
    return found if len(found) == len(spans) else None


def combined(
    lines: Sequence[DimContribution],
    tensor: torch.Tensor,
    scratch: Scratch,
    cells: torch.Tensor | None,
) -> torch.Tensor:
    """Return what a member contributes to a fused tensor.

    Args:
        lines: For each dimension.
        tensor: The member's, [n0, n1, ...].
        scratch: Memory for a block.
        cells: Where the contribution is to stand, [t0, t1, ...] of the tensor's dtype; None: in
            memory of its own.

    Returns:
        [t0, t1, ...]: `cells`, or the tensor itself or a new one.
    """
    if cells is None or not lines or not all(line.is_gather for line in lines):
        for dim, line in enumerate(lines):
            tensor = line.combine(tensor, dim)
        return tensor if cells is None else cells.copy_(tensor)
    chosen = [line.index(tensor, dim) for dim, line in enumerate(lines)]
    first, others = chosen[0], [(d, i) for d, i in enumerate(chosen) if d and i is not None]
    if first is not None and not others and cells.is_contiguous():
        return torch.index_select(tensor, 0, first, out=cells)
    # In blocks, so that what is taken along one dimension is in the cache for the next one. A GPU
    # would only wait for its next kernel.
    rows = max(1, BLOCK * tensor.shape[0] // max(tensor.numel(), 1))
    rows = rows if tensor.device.type == "cpu" else max(1, cells.shape[0])
    for start in range(0, cells.shape[0], rows):
        here = slice(start, min(start + rows, cells.shape[0]))
        block = tensor[here]
        if first is not None:
            block = scratch.empty(
                (here.stop - start, *tensor.shape[1:]), tensor.dtype, tensor.device
            )
            torch.index_select(tensor, 0, first[here], out=block)
        for dim, index in others:
            block = block.index_select(dim, index)
        cells[here] = block
    return cells


def _is_range(indices: Index) -> bool:
    """Tell whether indices follow one another."""
    return bool((np.diff(indices) == 1).all()) and (not len(indices) or bool(indices[0] >= 0))


class Lines:
    """What members contribute along the dimensions of tensors; what is equal is made once."""

    def __init__(self, graph: CouplingGraph) -> None:
        self._graph = graph
        self._uses = cache(lambda name, member: _uses(graph.of_member(member), name))
        # With the placements, so that no other one gets the identity of one of them.
        self._made: dict[Any, tuple[Placement, DimContribution]] = {}

    def of(
        self, name: str, placements: Sequence[Placement], member: int
    ) -> tuple[DimContribution, ...]:
        """For each dimension of a tensor."""
        graph = self._graph.of_member(member)
        # Members of one width have one analysis.
        uses = self._uses(name, member if self._graph.members else 0)
        return tuple(
            self._line(graph, (name, dim), placement, member, use)
            for dim, (placement, use) in enumerate(zip(placements, uses, strict=True))
        )

    def _line(
        self, graph: CouplingGraph, place: Place, placement: Placement, member: int, use: _Use
    ) -> DimContribution:
        # A placement is made for the units and the frozen indices of a dimension.
        key = id(placement), member, use
        if key not in self._made:
            self._made[key] = placement, _line(graph, place, placement, member, use)
        return self._made[key][1]


class _Use(NamedTuple):
    """Whether a dimension writes units, and whether U combines them there or M."""

    writes: bool
    unmerges: bool


def _uses(graph: CouplingGraph, name: str) -> list[_Use]:
    """Return how the dimensions of a tensor are used."""
    places = [(name, dim) for dim in range(graph.program.tensor(name).dim())]
    writes = [is_written(graph, place) for place in places]
    output = any(_kind(graph, place) is Kind.OUTPUT for place in places)
    owned = (d for d, place in enumerate(places) if place in graph.group_of and writes[d])
    # A tied weight both writes and reads along a dimension, and can only have one map there: M
    # once, as in W_fused = M W U, and none in an output, where 1/N stands for it.
    leading = None if output else next(owned, None)
    first = graph.program.canonical[name]
    return [
        _Use(writes[dim], (first, dim) in graph.readers and dim != leading)
        for dim in range(len(places))
    ]


def _line(
    graph: CouplingGraph, place: Place, placement: Placement, member: int, use: _Use
) -> DimContribution:
    entries, sources = placement.targets[member], placement.sources[member]
    targets, first, rows = entries, np.arange(len(entries)), np.arange(len(entries))
    # As listed where each is listed once, which is plain to see where they are in order.
    if not (np.diff(entries) > 0).all() and len(np.unique(entries)) < len(entries):
        targets, first, rows = np.unique(entries, return_index=True, return_inverse=True)
    merge = placement.merge[member]
    # Also of no entries at all, which numpy counts in integers.
    share = np.bincount(rows, np.abs(merge), minlength=len(targets)).astype(np.float64)
    # Explicit zeros are no share, and nothing to divide by.
    within = merge / np.where(share, share, 1.0)[rows]
    owned = np.zeros(graph.program.tensor(place[0]).shape[place[1]], dtype=bool)
    if use.writes:
        for group in graph.group_of.get(place, ()):
            owned[group.index[place].reshape(-1)] = True
    output, hosted = np.zeros_like(owned), np.zeros_like(owned)
    reason = graph.frozen.get(place)
    if reason is not None:
        output[reason.indices] = reason.kind is Kind.OUTPUT
        hosted[reason.indices] = reason.kind is Kind.KEEP_BASE
    origin = sources[first]
    weights = placement.unmerge[member] if use.unmerges else within
    return DimContribution(
        targets, share, owned[origin], output[origin], hosted[origin], rows, sources, weights
    )


def _kind(graph: CouplingGraph, place: Place) -> Kind | None:
    reason = graph.frozen.get(place)
    return None if reason is None else reason.kind
