"""The role of every tensor: what becomes of it beside the maps of the groups that own it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fxfuse.analysis.coupling import CouplingGraph, MixingNote
from fxfuse.analysis.labels import Kind
from fxfuse.graph.tensors import is_constant
from fxfuse.members.ranks import of_each


class RoleKind(StrEnum):
    """What becomes of a tensor."""

    #: The maps of the groups that own its dimensions say all; an output is the members' mean.
    MAPPED = "mapped"
    #: All of it, or what no group owns, is the members' mean: an approximation inside the network.
    AVERAGED = "averaged"
    #: What is frozen inside the network is the base member's.
    BASE = "base"
    #: The base member's tensor is copied: a constant, or one that the graph does not read.
    COPIED = "copied"
    #: It belongs to the head of one member, which keeps its own weights.
    HEAD = "head"
    #: Each member keeps its own, and runs on its own there.
    PER_MEMBER = "per_member"


@dataclass(frozen=True)
class Role:
    """What becomes of a tensor.

    Attributes:
        kind: The one thing that decides.
        spread: Largest difference between members in what is averaged of it, relative to the
            largest weight. A tensor of kind `base` may be averaged in part, and one of kind
            `per_member` would be, if there were one for all members.
        why: Why it is the base member's; of kind `per_member`, why it would be.
        member: Of a head: the member that it belongs to.
        absent_in: Members that lack the residual block that it is in, which is the identity there.
    """

    kind: RoleKind
    spread: float = 0.0
    why: str = ""
    member: int | None = None
    absent_in: tuple[int, ...] = ()


def make_roles(
    graph: CouplingGraph,
    states: Sequence[Mapping[str, Any]],
    absent: Mapping[str, Collection[int]],
) -> dict[str, Role]:
    """Return the role of every tensor of the members, by name.

    Args:
        graph: The analysis of the members.
        states: For each member, its tensors by name.
        absent: Tensors that some members lack → the numbers of these members.
    """
    averaged, frozen = inner_averages(graph, states), base_reasons(graph)

    def role(name: str) -> Role:
        if name in graph.program.heads:
            return Role(RoleKind.HEAD, member=graph.program.heads[name])
        if name in frozen:
            return Role(RoleKind.BASE, averaged.get(name, 0.0), frozen[name])
        if combination_of(graph, name) is Combination.COPY:
            return Role(RoleKind.COPIED)
        if name in averaged:
            return Role(RoleKind.AVERAGED, averaged[name])
        return Role(RoleKind.MAPPED)

    return {
        name: replace(role(name), absent_in=tuple(absent.get(name, ())))
        for name in graph.program.names
    }


def kept_per_member(roles: Mapping[str, Role], names: Iterable[str]) -> dict[str, Role]:
    """Return the same roles, but that each member keeps its own of the named tensors."""
    own = {name: replace(roles[name], kind=RoleKind.PER_MEMBER) for name in names}
    return {**roles, **own}


class Combination(StrEnum):
    """How the members' contributions to a tensor are combined."""

    #: The base member's tensor is copied.
    COPY = "copy"
    #: A tensor of a head: its member's weights at the units that come from this member.
    OWN = "own"
    #: Free dimensions or the base member's tell members apart, or the output's maps hold the 1/N.
    SUM = "sum"
    #: Nothing tells the members apart: their mean is taken.
    MEAN = "mean"


def combination_of(graph: CouplingGraph, name: str) -> Combination:
    """Return how the members' contributions to a tensor are combined."""
    program = graph.program
    tensor = program.tensor(name)
    if is_constant(tensor) or program.canonical[name] not in program.reached():
        return Combination.COPY
    wish = graph.asked.get(program.canonical[name])
    if wish is not None:
        return Combination.COPY if wish.kind is Kind.KEEP_BASE else Combination.MEAN
    if name in program.heads:
        return Combination.OWN
    places = [(name, d) for d in range(tensor.dim())]
    for place in places:
        reason = graph.frozen.get(place)
        if reason is not None and reason.kind in (Kind.KEEP_BASE, Kind.OUTPUT):
            return Combination.SUM
        # A dimension that is only read sums over the members: without a dimension that is
        # written, the sum has to become the mean.
        if place in graph.group_of and is_written(graph, place):
            return Combination.SUM
    # What runs change (a counter, a moving average) starts as it does in one member.
    return Combination.COPY if program.canonical[name] in program.written else Combination.MEAN


def is_written(graph: CouplingGraph, place: tuple[str, int]) -> bool:
    """Tell whether a dimension writes neurons somewhere; one that is only read sums over them."""
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
    """Return the analysis's mixing notes, without those on parameters that all members agree on."""
    # Of a head there is one only.
    sources = {name for note in graph.mixing for name in note.sources} - graph.program.heads.keys()

    def differing(_: int, state: Mapping[str, Any]) -> list[str]:
        return [name for name in sorted(sources) if not torch.equal(state[name], states[0][name])]

    differ = {name for _, names in of_each(states, differing) for name in names}
    return tuple(note for note in graph.mixing if not note.sources or note.sources & differ)


def inner_averages(graph: CouplingGraph, states: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return tensors that are averaged inside the network, and how far the members disagree there.

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
    combination, rank = combination_of(graph, name), graph.program.tensor(name).dim()
    if combination is Combination.MEAN:
        return ()
    places = [(name, dim) for dim in range(rank)]
    reasons = [graph.frozen.get(place) for place in places]
    if combination is not Combination.SUM or any(
        r is not None and r.kind is Kind.OUTPUT for r in reasons
    ):
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


def base_reasons(graph: CouplingGraph) -> dict[str, str]:
    """Return the tensors of the trunk that are the base member's, wholly or in part, and why.

    Frozen inside the network, or by the caller; the first reason of each.
    """
    found: dict[str, str] = {}
    for (name, _), reason in graph.frozen.items():
        if reason.kind is Kind.KEEP_BASE:
            found.setdefault(name, reason.why)
    for name in graph.program.names:
        wish = graph.asked.get(graph.program.canonical[name])
        # A tensor without dimensions has no frozen place.
        if wish is not None and wish.kind is Kind.KEEP_BASE:
            found.setdefault(name, wish.why)
    return {name: why for name, why in found.items() if name not in graph.program.heads}


def units_of_members(
    graph: CouplingGraph, n_members: int, absent: Mapping[str, Collection[int]]
) -> list[dict[str, int]]:
    """For each member, how many units of each group it has; empty where all members have as many.

    Of a block that a member lacks it has 0 units.
    """
    if not graph.members and not absent:
        return [{} for _ in range(n_members)]
    lacking = [graph.lacking(absent, member) for member in range(n_members)]
    return [
        {
            group.name: 0 if group.name in missing else graph.units_of(group.name, member)
            for group in graph.groups
        }
        for member, missing in enumerate(lacking)
    ]
