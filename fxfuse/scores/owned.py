"""Sums over what each unit owns: the step that most scores share."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import torch

from fxfuse.coupling import CouplingGraph, Index
from fxfuse.scores.registry import Scores


def owned_sums(
    graph: CouplingGraph,
    values: Mapping[str, torch.Tensor],
    kept: Mapping[str, Index],
    absent: Collection[str] = (),
) -> Scores:
    """For each unit of one member, the sum of some values over all that it owns.

    Args:
        graph: The analysis of the members.
        values: A value for each element of some of the member's tensors, by canonical name.
        kept: For each group, the units that exist: values that belong to another, dropped unit as
            well (a weight towards it) do not count.
        absent: Tensors that some members lack. They do not count where a unit owns others, by
            which members can be compared.

    Returns:
        For each group, float64 [n_units].
    """
    sums: Scores = {g.name: np.zeros(g.n_units) for g in graph.groups}
    for name, tensor in values.items():
        value = tensor.detach().to(torch.float64)
        for dim in range(value.dim()):
            place = (name, dim)
            others = [d for d in range(value.dim()) if d != dim]
            for group in graph.group_of.get(place, ()):
                if name in absent and not all(n in absent for n, _ in group.index):
                    continue
                restricted = value
                for other in others:
                    index = _existing(graph, (name, other), kept)
                    if index is not None:
                        restricted = restricted.index_select(other, index.to(value.device))
                line = restricted.sum(others).cpu().numpy() if others else restricted.cpu().numpy()
                sums[group.name] += line[group.index[place]].sum(axis=1)
    return sums


def _existing(
    graph: CouplingGraph, place: tuple[str, int], kept: Mapping[str, Index]
) -> torch.Tensor | None:
    """Indices of a place that no dropped unit owns; None: all of them."""
    if place not in graph.group_of:
        return None
    exists = np.ones(graph.captured.tensor(place[0]).shape[place[1]], dtype=bool)
    for group in graph.group_of[place]:
        exists[group.index[place].reshape(-1)] = False
        exists[group.index[place][kept[group.name]].reshape(-1)] = True
    return torch.from_numpy(np.flatnonzero(exists))
