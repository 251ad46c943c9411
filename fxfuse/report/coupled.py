"""The coupling graph as a report shows it: places in lanes, what ties them, what is frozen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from fxfuse.coupling import CouplingGraph, Place
from fxfuse.labels import Kind
from fxfuse.source_lines import source_of

#: What a kind of freezing means, as the name of its lane.
FROZEN_LANES = {
    Kind.COMMON: "frozen: means the same in all members",
    Kind.OUTPUT: "frozen: the network's output",
    Kind.HOST: "frozen: kept from the host",
}
FREE = "free"


@dataclass(frozen=True)
class Dot:
    """A dimension of a tensor.

    Attributes:
        anchor: Of its line in the page.
        place: Tensor and dimension, as `tensor:dim`.
        order: Number of its tensor in the network's order.
        lane: Number of its lane.
        state: `free`, or the name of a frozen lane.
        size: Number of indices.
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
    """The coupling graph of an analysis."""
    ties = _ties(graph)
    order = {name: number for number, name in enumerate(graph.captured.names)}
    lanes: list[Lane] = []
    for group in graph.groups:
        places = sorted(group.index, key=lambda place: (order[place[0]], place[1]))
        dots = [_dot(graph, place, order, ties, len(lanes), FREE, group.name) for place in places]
        lanes.append(Lane(group.name, group.n_units, tuple(dots)))
    for kind, name in FROZEN_LANES.items():
        places = sorted(
            (p for p, reason in graph.frozen.items() if reason.kind is kind and p[0] in order),
            key=lambda place: (order[place[0]], place[1]),
        )
        if places:
            dots = [_dot(graph, place, order, ties, len(lanes), name) for place in places]
            lanes.append(Lane(name, None, tuple(dots)))
    return Coupled(tuple(lanes), _edges(graph, lanes))


def _dot(
    graph: CouplingGraph,
    place: Place,
    order: Mapping[str, int],
    ties: Mapping[Place, tuple[str, ...]],
    lane: int,
    state: str,
    group: str = "",
) -> Dot:
    reason = graph.frozen.get(place)
    frozen = state != FREE and reason is not None
    return Dot(
        f"lane{lane}-{order[place[0]]}-{place[1]}",
        f"{place[0]}:{place[1]}",
        order[place[0]],
        lane,
        state,
        int(graph.captured.tensor(place[0]).shape[place[1]]),
        reason.why if frozen and reason is not None else group,
        f"{reason.node}  {reason.source}".strip() if frozen and reason is not None else "",
        () if frozen else ties.get(place, ()),
    )


def _ties(graph: CouplingGraph) -> dict[Place, tuple[str, ...]]:
    """For each place, what it is tied to by which operator at which source line."""
    nodes: dict[str, fx.Node] = {node.name: node for node in graph.captured.graph.nodes}
    found: dict[Place, list[str]] = {}
    for left, right, data in graph.to_networkx().edges(data=True):
        node = nodes[data["nodes"][0]]
        by = f"{node.name} [{node.target}]  {source_of(node)}".rstrip()
        found.setdefault(left, []).append(f"{right[0]}:{right[1]} by {by}")
        found.setdefault(right, []).append(f"{left[0]}:{left[1]} by {by}")
    return {place: tuple(lines) for place, lines in found.items()}


def _edges(graph: CouplingGraph, lanes: list[Lane]) -> tuple[tuple[Dot, Dot], ...]:
    tied = graph.to_networkx()
    found = []
    for lane in lanes:
        by_place = {dot.place: dot for dot in lane.dots}
        for left, right in tied.edges:
            a, b = (by_place.get(f"{name}:{dim}") for name, dim in (left, right))
            if a is not None and b is not None:
                found.append((a, b))
    return tuple(found)
