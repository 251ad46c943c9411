"""The role of every tensor that no group owns: averaged, kept from the base member, or copied."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from enum import StrEnum
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fxfuse.analysis.coupling import CouplingGraph, MixingNote
from fxfuse.analysis.labels import Kind
from fxfuse.graph.tensors import is_constant
from fxfuse.members.ranks import of_each


class Role(StrEnum):
    """How the members' contributions to a tensor are combined."""

    #: The base member's tensor is copied.
    COPY = "copy"
    #: A tensor of a head: its member's weights at the units that come from this member.
    OWN = "own"
    #: Free or hosted dimensions tell the members apart, or the output's maps hold the 1/N.
    SUM = "sum"
    #: Nothing tells the members apart: their mean is taken.
    MEAN = "mean"


def role_of(graph: CouplingGraph, name: str) -> Role:
    """How the members' contributions to a tensor are combined."""
    program = graph.program
    tensor = program.tensor(name)
    if is_constant(tensor) or program.canonical[name] not in program.reached():
        return Role.COPY
    wish = graph.asked.get(program.canonical[name])
    if wish is not None:
        return Role.COPY if wish.kind is Kind.KEEP_BASE else Role.MEAN
    if name in program.heads:
        return Role.OWN
    places = [(name, d) for d in range(tensor.dim())]
    for place in places:
        reason = graph.frozen.get(place)
        if reason is not None and reason.kind in (Kind.KEEP_BASE, Kind.OUTPUT):
            return Role.SUM
        # A dimension that is only read sums over the members: without a dimension that is
        # written, the sum has to become the mean.
        if place in graph.group_of and is_written(graph, place):
            return Role.SUM
    return Role.MEAN


def is_written(graph: CouplingGraph, place: tuple[str, int]) -> bool:
    """Whether a dimension writes neurons somewhere; one that is only read sums over them."""
    key = (graph.program.canonical[place[0]], place[1])
    return key in graph.writers or key not in graph.readers


def own_indices(graph: CouplingGraph, place: tuple[str, int]) -> NDArray[np.bool_]:
    """Where along a dimension a member has units of its own, or the base member all: bool [size].

    Dimensions that are only read sum over the members, so they tell nobody apart.
    """
    name, dim = place
    found = np.zeros(graph.program.tensor(name).shape[dim], dtype=bool)
    reason = graph.frozen.get(place)
    if reason is not None and reason.kind is Kind.KEEP_BASE:
        found[reason.indices] = True
    if is_written(graph, place):
        for group in graph.group_of.get(place, ()):
            found[group.index[place].reshape(-1)] = True
    return found


def relevant_notes(
    graph: CouplingGraph, states: Sequence[Mapping[str, Any]]
) -> tuple[MixingNote, ...]:
    """The analysis's mixing notes, without those on parameters that all members agree on."""
    # Of a head there is one only.
    sources = {name for note in graph.mixing for name in note.sources} - graph.program.heads.keys()

    def differing(_: int, state: Mapping[str, Any]) -> list[str]:
        return [name for name in sorted(sources) if not torch.equal(state[name], states[0][name])]

    differ = {name for _, names in of_each(states, differing) for name in names}
    return tuple(note for note in graph.mixing if not note.sources or note.sources & differ)


def inner_averages(graph: CouplingGraph, states: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Tensors that are averaged inside the network, and how far the members disagree there.

    All of a tensor, or the part of it that belongs to no member's own units.
    """
    cells = {name: _averaged_cells(graph, name) for name in graph.program.names}
    averaged = {name: where for name, where in cells.items() if where is not None}

    def distances(member: int, state: Mapping[str, Any]) -> dict[str, float]:
        found = {}
        for name, where in averaged.items():
            theirs = where
            if graph.members:
                theirs = _averaged_cells(graph.of_member(member), name) or ()
            found[name] = _distance(state[name][theirs], states[0][name][where])
        return found

    apart = [found for _, found in of_each(states, distances)]
    found = {}
    for name in averaged:
        first = states[0][name]
        scale = max(float(first.abs().max()) if first.numel() else 0.0, 1e-30)
        found[name] = max(distance[name] for distance in apart) / scale
    return found


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference of two tensors; of different sizes, each is compared with nothing."""
    differences = [a - b] if a.shape == b.shape else [a, b]
    return max((float(d.abs().max()) for d in differences if d.numel()), default=0.0)


def _averaged_cells(graph: CouplingGraph, name: str) -> tuple[Any, ...] | None:
    """Index of the part of a tensor that is averaged inside the network, if there is one.

    Also of a part that should be and cannot: a weight that is used transposed as well writes the
    sum of the members into an index that all of them share.
    """
    role, rank = role_of(graph, name), graph.program.tensor(name).dim()
    if role is Role.MEAN:
        return ()
    places = [(name, dim) for dim in range(rank)]
    reasons = [graph.frozen.get(place) for place in places]
    if role is not Role.SUM or any(r is not None and r.kind is Kind.OUTPUT for r in reasons):
        return None
    shared = [np.flatnonzero(~own_indices(graph, place)) for place in places]
    if rank and all(len(indices) for indices in shared):
        return tuple(torch.from_numpy(indices) for indices in np.ix_(*shared))
    canonical = graph.program.canonical[name]
    for dim, indices in enumerate(shared):
        others = (place for place in places if place[1] != dim and place in graph.group_of)
        summed = any((canonical, d) in graph.readers for _, d in others)
        if len(indices) and (canonical, dim) in graph.writers and summed:
            return (*[slice(None)] * dim, torch.from_numpy(indices))
    return None


def hosted_names(graph: CouplingGraph) -> tuple[str, ...]:
    """Tensors of the trunk with a dimension that is frozen inside the network, or by the caller."""
    heads, canonical = graph.program.heads, graph.program.canonical
    found = {n for (n, _), r in graph.frozen.items() if r.kind is Kind.KEEP_BASE and n not in heads}
    wishes = {name for name, wish in graph.asked.items() if wish.kind is Kind.KEEP_BASE}
    return tuple(n for n in graph.program.names if n in found or canonical[n] in wishes)


def hosted_reasons(graph: CouplingGraph) -> dict[str, str]:
    """Why tensors are hosted, by name; the first reason of each."""
    names = set(hosted_names(graph))
    found: dict[str, str] = {}
    for (name, _), reason in graph.frozen.items():
        if name in names and reason.kind is Kind.KEEP_BASE:
            found.setdefault(name, reason.why)
    return found


def widths_of(
    graph: CouplingGraph, n_members: int, absent: Mapping[str, Collection[int]]
) -> dict[str, tuple[int, ...]]:
    """For each group, how many units each member has, where members differ in width or depth.

    Args:
        graph: The analysis of the members.
        n_members: N.
        absent: Tensors that some members lack → the numbers of these members.
    """
    if not graph.members and not absent:
        return {}
    lacking = [graph.lacking(absent, member) for member in range(n_members)]
    return {
        group.name: tuple(
            0 if group.name in missing else graph.units_of(group.name, member)
            for member, missing in enumerate(lacking)
        )
        for group in graph.groups
    }


def copied_names(graph: CouplingGraph) -> tuple[str, ...]:
    """Tensors that are copied from the base member because nothing is to be fused in them."""
    kept = {*hosted_names(graph), *graph.program.heads}
    names = (n for n in graph.program.names if n not in kept)
    return tuple(n for n in names if role_of(graph, n) == Role.COPY)
