"""The coupling graph as a report shows it: places in lanes, what ties them, what is frozen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import networkx as nx
from torch import fx

from fxfuse.analysis.coupling import CouplingGraph, Place
from fxfuse.analysis.labels import Kind
from fxfuse.graph.source_lines import source_of

#: What a kind of freezing means, as the name of its lane.
FROZEN_LANES = {
    Kind.SHARED_INDEX: "frozen: means the same in all members",
    Kind.OUTPUT: "frozen: the network's output",
    Kind.KEEP_BASE: "frozen: kept from the base member",
}
FREE = "free"
#: Modules that the line of a lane names.
_SHOWN = 4


@dataclass(frozen=True)
class Dot:
    """A dimension of a tensor.

    Attributes:
        anchor: Of its line in the page.
        place: Tensor and dimension, as `tensor:dim`.
        order: Number of its tensor in the network's order.
        lane: Number of its lane.
        state: `free`, or the name of a frozen lane.
        why: Why it is frozen, or the group that it is free in.
        where: Graph node and source line of the reason, or "".
        ties: What couples it to others, one line each.
    """

    anchor: str
    place: str
    order: int
    lane: int
    state: str
    size: int
    why: str
    where: str
    ties: tuple[str, ...]


@dataclass(frozen=True)
class Lane:
    """A coupling group, or the frozen dimensions of one kind.

    Attributes:
        name: Of the group, or of the kind.
        n_units: Units of the group in one member; None for a kind.
        dots: Its places, in the network's order.
    """

    name: str
    n_units: int | None
    dots: tuple[Dot, ...]


@dataclass(frozen=True)
class Coupled:
    """The coupling graph.

    Attributes:
        lanes: Groups in the network's order, then what is frozen.
        edges: Pairs of dots of one lane that an operator ties.
    """

    lanes: tuple[Lane, ...]
    edges: tuple[tuple[Dot, Dot], ...]


def coupled(graph: CouplingGraph) -> Coupled:
    """Return the coupling graph of an analysis."""
    tied = graph.to_networkx()
    ties = _ties(graph, tied)
    order = {name: number for number, name in enumerate(graph.program.names)}
    lanes: list[Lane] = []

    def add(name: str, n_units: int | None, places: Iterable[Place], state: str) -> None:
        dots = tuple(
            _dot(graph, place, order[place[0]], len(lanes), state, name, ties)
            for place in sorted(places, key=lambda place: (order[place[0]], place[1]))
        )
        if dots:
            lanes.append(Lane(name, n_units, dots))

    for group in graph.groups:
        add(group.name, group.n_units, group.index, FREE)
    for kind, name in FROZEN_LANES.items():
        frozen = (p for p, reason in graph.frozen.items() if reason.kind is kind and p[0] in order)
        add(name, None, frozen, name)
    return Coupled(tuple(lanes), _edges(tied, lanes))


def _dot(
    graph: CouplingGraph,
    place: Place,
    order: int,
    lane: int,
    state: str,
    group: str,
    ties: Mapping[Place, tuple[str, ...]],
) -> Dot:
    name, dim = place
    size = int(graph.program.tensor(name).shape[dim])
    told = (f"lane{lane}-{order}-{dim}", f"{name}:{dim}", order, lane, state, size)
    if state == FREE:
        return Dot(*told, why=group, where="", ties=ties.get(place, ()))
    reason = graph.frozen[place]
    return Dot(*told, why=reason.why, where=f"{reason.node}  {reason.source}".strip(), ties=())


def _ties(graph: CouplingGraph, tied: nx.Graph) -> dict[Place, tuple[str, ...]]:
    """Return for each place, what it is tied to by which operator at which source line."""
    nodes: dict[str, fx.Node] = {node.name: node for node in graph.program.graph.nodes}
    found: dict[Place, list[str]] = {}
    for left, right, data in tied.edges(data=True):
        node = nodes[data["nodes"][0]]
        by = f"{node.name} [{node.target}]  {source_of(node)}".rstrip()
        found.setdefault(left, []).append(f"{right[0]}:{right[1]} by {by}")
        found.setdefault(right, []).append(f"{left[0]}:{left[1]} by {by}")
    return {place: tuple(lines) for place, lines in found.items()}


def _edges(tied: nx.Graph, lanes: Iterable[Lane]) -> tuple[tuple[Dot, Dot], ...]:
    found = []
    for lane in lanes:
        by_place = {dot.place: dot for dot in lane.dots}
        for left, right in tied.edges:
            a, b = (by_place.get(f"{name}:{dim}") for name, dim in (left, right))
            if a is not None and b is not None:
                found.append((a, b))
    return tuple(found)


def modules_of(lane: Lane) -> str:
    """Return the modules that a lane's tensors are in, the first few by name."""
    paths = (dot.place.rpartition(":")[0].rpartition(".")[0] or "the network" for dot in lane.dots)
    names = list(dict.fromkeys(paths))
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
