"""Sums over what each unit owns: the step that most scores share."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from fxfuse.analysis.coupling import CouplingGraph, Index
from fxfuse.common.scratch import BLOCK, Scratch
from fxfuse.planning.scores.registry import Scores

#: Value of each number of a tensor, by the tensor's name.
Value = Callable[[str, torch.Tensor], torch.Tensor]


def owned_sums(
    graph: CouplingGraph,
    values: Mapping[str, torch.Tensor],
    kept: Mapping[str, Index],
    absent: Collection[str] = (),
    *,
    names: Iterable[str] | None = None,
    value_of: Value | None = None,
) -> Scores:
    """Return for each unit of one member, the sum of some values over all that it owns.

    Args:
        graph: The analysis of the members.
        values: For some of the member's tensors, by canonical name, a number for each element. Each
            is read once, after the one before it was let go.
        kept: For each group, the units that exist: values that belong to another, dropped unit as
            well (a weight towards it) do not count.
        absent: Tensors that some members lack. They do not count where a unit owns others, by
            which members can be compared.
        names: Those of `values` that count; None: all.
        value_of: Value of each number of a tensor, by its name, float64 [*] → float64 [*],
            elementwise; it may write into what it is given. None: the number itself.

    Returns:
        For each group, float64 [n_units].
    """
    sums: Scores = {g.name: np.zeros(g.n_units) for g in graph.groups}
    scratch = Scratch()
    for name in values if names is None else names:
        tensor = values[name].detach()
        wanted = {
            dim: _existing_elsewhere(graph, name, dim, tensor.dim(), kept)
            for dim in range(tensor.dim())
            if (name, dim) in graph.group_of
        }
        made = partial(value_of, name) if value_of is not None else None
        for dim, line in _lines(tensor, wanted, made, scratch).items():
            for group in graph.group_of[name, dim]:
                if name in absent and not all(n in absent for n, _ in group.index):
                    continue
                sums[group.name] += line[group.index[name, dim]].sum(axis=1)
    return sums


def _lines(
    tensor: torch.Tensor,
    wanted: Mapping[int, Mapping[int, torch.Tensor]],
    value_of: Callable[[torch.Tensor], torch.Tensor] | None,
    scratch: Scratch,
) -> dict[int, NDArray[np.float64]]:
    """Sum the values over all other dimensions, for each dimension in `wanted`.

    That also says which indices of the others count; all, if left out. Of complex numbers the
    absolute values count.
    """
    lines = {
        dim: torch.zeros(tensor.shape[dim], dtype=torch.float64, device=tensor.device)
        for dim in wanted
    }
    rows = max(1, BLOCK * tensor.shape[0] // max(tensor.numel(), 1)) if tensor.dim() else 1
    for start in range(0, tensor.shape[0] if tensor.dim() and wanted else 0, rows):
        part = tensor[start : start + rows]
        if part.is_complex():
            part = part.abs()
        block = scratch.empty(part.shape, torch.float64, part.device).copy_(part)
        if value_of is not None:
            block = value_of(block)
        for dim, counting in wanted.items():
            part = block
            for other, index in counting.items():
                here = index
                if other == 0:
                    here = index[(index >= start) & (index < start + rows)] - start
                part = part.index_select(other, here.to(block.device))
            line = _sum_of_others(part, dim)
            if dim == 0:
                lines[dim][start : start + rows] = line
            else:
                lines[dim] += line
    return {dim: line.cpu().numpy() for dim, line in lines.items()}


def _sum_of_others(values: torch.Tensor, dim: int) -> torch.Tensor:
    """Return the sums over all dimensions but one."""
    # Those in front and those behind apart: torch takes twice as long for both at once.
    if dim:
        values = values.sum(list(range(dim)))
    return values.flatten(1).sum(1) if values.dim() > 1 else values


def _existing_elsewhere(
    graph: CouplingGraph, name: str, dim: int, rank: int, kept: Mapping[str, Index]
) -> dict[int, torch.Tensor]:
    """For each other dimension of a tensor, the indices that no dropped unit owns, if not all."""
    found = {}
    for other in range(rank):
        index = None if other == dim else _existing(graph, (name, other), kept)
        if index is not None:
            found[other] = index
    return found


def _existing(
    graph: CouplingGraph, place: tuple[str, int], kept: Mapping[str, Index]
) -> torch.Tensor | None:
    """Return the indices of a place that no dropped unit owns; None: all of them."""
    groups = graph.group_of.get(place, ())
    if all(len(kept[group.name]) == group.n_units for group in groups):
        return None
    exists = np.ones(graph.program.tensor(place[0]).shape[place[1]], dtype=bool)
    for group in groups:
        exists[group.index[place].reshape(-1)] = False
        exists[group.index[place][kept[group.name]].reshape(-1)] = True
    return torch.from_numpy(np.flatnonzero(exists))
