"""Outputs whose units are free (`output_dims`): who stands where, so that oracles can compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import fx

from fxfuse.analysis.coupling import CouplingGraph, Index
from fxfuse.analysis.labels import AbstractTensor, DimLabels, neurons
from fxfuse.graph.tensors import is_constant
from fxfuse.transform.layout import Layout


def put_back(
    graph: CouplingGraph, permutations: Mapping[str, Index], outputs: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """Undo a permutation of units where they are handed out."""
    source = _moved_ids(graph, permutations)
    return [
        _ordered(output, value, source)
        for output, value in zip(outputs, _output_values(graph), strict=True)
    ]


def _output_values(graph: CouplingGraph) -> list[AbstractTensor]:
    found = (graph.values.get(n) for n in graph.program.outputs() if isinstance(n, fx.Node))
    return [value for value in found if isinstance(value, AbstractTensor)]


def _moved_ids(graph: CouplingGraph, permutations: Mapping[str, Index]) -> Index:
    """Return for each neuron of the permuted network, which neuron it was before."""
    source = np.arange(graph.coupling.count)
    for owner, place in enumerate(graph.coupling.owners):
        for group in graph.group_of.get(place, ()):
            if group.name in permutations:
                rows = graph.coupling.starts[owner] + group.index[place]
                source[rows.reshape(-1)] = rows[permutations[group.name]].reshape(-1)
    return source


def _ordered(output: torch.Tensor, value: AbstractTensor, source: Index) -> torch.Tensor:
    for f in value.fields:
        order = _order(f, source)
        if order is None:
            continue
        front = tuple(range(len(f.dims)))
        lines = output.movedim(f.dims, front)
        moved = lines.flatten(0, len(front) - 1)[torch.from_numpy(order)].reshape(lines.shape)
        output = moved.movedim(front, f.dims)
    return output


def _order(f: DimLabels, source: Index) -> Index | None:
    """Return where each place of an output has to be read from; None: as it is."""
    neuron = neurons(f.bare).reshape(-1).numpy()
    wanted = f.ids.reshape(-1).numpy()
    # The place of a neuron (its part) is the same for the neuron that takes its place.
    held = source[neuron] + (wanted - neuron)
    if np.array_equal(wanted, held):
        return None
    by_wanted, by_held = np.argsort(wanted, kind="stable"), np.argsort(held, kind="stable")
    if not np.array_equal(wanted[by_wanted], held[by_held]):
        # A unit is handed out that was not before: the comparison will say so.
        return None
    order = np.empty_like(by_held)
    order[by_wanted] = by_held
    return order


def parts(
    wide: torch.Tensor, outputs: Sequence[torch.Tensor], layouts: Mapping[int, Layout]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return an output of the concatenated network, and what it has to be.

    An output that does not grow is the members' mean. Of another, for each member, there is the
    part that is handed out for it and its own output (their mean in those places that all members
    share). Whole numbers have no mean: where members differ in them, there is nothing to compare,
    and both lists are empty.
    """
    whole = is_constant(wide)
    mean = outputs[0] if whole else torch.stack(list(outputs)).mean(0)
    if not layouts:
        if whole and not all(torch.equal(own, mean) for own in outputs):
            return [], []
        return [wide], [mean]
    found, expected = [], []
    for member, own in enumerate(outputs):
        part, agreed = wide, own
        for dim, layout in layouts.items():
            places = np.flatnonzero((layout.copy == member) | (layout.copy < 0))
            ordered = places[np.argsort(layout.source[places], kind="stable")]
            part = part.index_select(dim, torch.from_numpy(ordered))
            shared = torch.from_numpy(layout.source[layout.copy < 0])
            agreed = agreed.index_copy(dim, shared, mean.index_select(dim, shared))
        if whole and not torch.equal(agreed, own):
            return [], []
        found.append(part)
        expected.append(agreed)
    return found, expected
