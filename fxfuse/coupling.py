"""Coupling: the units and groups of a network, what is frozen and why, and who couples whom."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, overload

import networkx as nx
import numpy as np
from numpy.typing import NDArray
from torch import fx, nn
from torch.export import ExportedProgram

from fxfuse.capture import Captured, capture, is_constant, source_of
from fxfuse.errors import UnknownTensorError
from fxfuse.interpreter import interpret
from fxfuse.labels import Kind, Ledger, Mixing

#: A dimension of a named tensor.
Place = tuple[str, int]
Index = NDArray[np.int64]


@dataclass(frozen=True)
class CouplingGroup:
    """Units that are interchangeable.

    Attributes:
        name: The first place of the group, as `tensor:dim`.
        n_units: Number of units.
        index: For each place, which indices each unit owns there, int64 [n_units, slots_per_unit].
    """

    name: str
    n_units: int
    index: Mapping[Place, Index]

    def slots(self) -> int:
        """Number of slots of one unit, over all places."""
        return sum(rows.shape[1] for rows in self.index.values())


@dataclass(frozen=True)
class FrozenReason:
    """Why a dimension, or a part of one, must stay as it is.

    Attributes:
        kind: What that means for fusion.
        why: One sentence.
        node: Name of the graph node that froze it, or "".
        source: File, line and code of that node, or "".
        indices: The frozen indices, int64 [n]; others of the same dimension may be free.
    """

    kind: Kind
    why: str
    node: str
    source: str
    indices: Index = field(repr=False)


@dataclass(frozen=True)
class MixingNote:
    """An operator after which members put side by side are not the mean of the members.

    Attributes:
        why: What mixes.
        node: Name of the graph node.
        source: File, line and code of that node.
        sources: When not empty: it mixes only if members disagree on one of these parameters.
    """

    why: str
    node: str
    source: str
    sources: frozenset[str] = frozenset()


@dataclass(frozen=True)
class CouplingGraph:
    """The result of `analyze`.

    Attributes:
        captured: The captured network.
        groups: Coupling groups.
        frozen: Reason for every place that is frozen, wholly or in part.
        mixing: Operators that mix members.
        free_fraction: Share of parameter elements that lie in tensors with at least one free
            dimension, of those that the graph reads.
    """

    captured: Captured
    groups: tuple[CouplingGroup, ...]
    frozen: Mapping[Place, FrozenReason]
    mixing: tuple[MixingNote, ...]
    free_fraction: float
    readers: frozenset[Place]
    writers: frozenset[Place]
    values: Mapping[fx.Node, Any] = field(repr=False)
    ledger: Ledger = field(repr=False)

    @cached_property
    def group_of(self) -> Mapping[Place, tuple[CouplingGroup, ...]]:
        """The groups that own slots in each place."""
        found: dict[Place, list[CouplingGroup]] = defaultdict(list)
        for group in self.groups:
            for place in group.index:
                found[place].append(group)
        return {place: tuple(groups) for place, groups in found.items()}

    @cached_property
    def _graph(self) -> nx.Graph:
        return _networkx(self)

    def to_networkx(self) -> nx.Graph:
        """The coupling as a graph: nodes `(tensor, dim)`, edges with the fx nodes that tied them.

        Node attributes: `size`, `groups` (names), `frozen` (why, or ""). Edge attribute
        `nodes`: names of graph nodes, in graph order. Nodes named `<name>` are results of
        operators without a rule.
        """
        return self._graph.copy()

    @overload
    def explain(self, first: str, second: int) -> str: ...

    @overload
    def explain(self, first: Place, second: Place | None = None) -> str: ...

    def explain(self, first: Any, second: Any = None) -> str:
        """Says in which group a dimension is and why, why it is frozen, or what couples two.

        Args:
            first: A tensor name, or a pair `(tensor, dim)`.
            second: The dimension if `first` is a name; another pair to explain a coupling.

        Raises:
            UnknownTensorError: The network has no such tensor or dimension.
        """
        if isinstance(first, str):
            return self._explain_one((first, int(second)))
        if second is None:
            return self._explain_one(tuple(first))
        return self._explain_two(tuple(first), tuple(second))

    def _place(self, place: Place) -> Place:
        name, dim = place
        if name not in self.captured.canonical:
            close = [n for n in self.captured.names if name in n][:5]
            raise UnknownTensorError(
                f"the network has no tensor {name!r}",
                how="use a name of model.state_dict()" + (f", such as {close}" if close else ""),
            )
        rank = self.captured.tensor(name).dim()
        if not -rank <= dim < rank:
            raise UnknownTensorError(
                f"{name!r} has no dimension {dim}", why=f"it has {rank} dimensions"
            )
        return self.captured.canonical[name], dim % rank

    def _explain_one(self, place: Place) -> str:
        key = self._place(place)
        lines = [f"{place[0]}, dimension {key[1]}:"]
        for group in self.group_of.get(key, ()):
            slots = group.index[key].shape[1]
            lines.append(
                f"  free, in group {group.name!r}: {group.n_units} units, "
                f"{slots} slot{'s' if slots > 1 else ''} of each unit here; coupled with"
            )
            for other in group.index:
                if other != key:
                    lines += [f"    {other[0]}, dimension {other[1]}"]
                    lines += [f"      {step}" for step in self._chain(key, other)]
        reason = self.frozen.get(key)
        if reason is not None:
            part = (
                ""
                if len(reason.indices) == self._size(key)
                else f" ({len(reason.indices)} indices)"
            )
            lines.append(f"  frozen{part} ({reason.kind}): {reason.why}")
            if reason.node:
                lines.append(f"    at {reason.node}  {reason.source}".rstrip())
        return "\n".join(lines)

    def _explain_two(self, a: Place, b: Place) -> str:
        first, second = self._place(a), self._place(b)
        head = f"{a[0]}, dimension {first[1]} and {b[0]}, dimension {second[1]}"
        if first == second:
            return f"{head}: the same place"
        steps = self._chain(first, second)
        if not steps:
            return f"{head}: not coupled"
        return "\n".join([f"{head}: coupled by", *(f"  {step}" for step in steps)])

    def _size(self, place: Place) -> int:
        return int(self.captured.tensor(place[0]).shape[place[1]])

    def _chain(self, a: Place, b: Place) -> list[str]:
        if a not in self._graph or b not in self._graph or not nx.has_path(self._graph, a, b):
            return []
        by_name = {node.name: node for node in self.captured.graph.nodes}
        path = nx.shortest_path(self._graph, a, b)
        steps = []
        for left, right in pairwise(path):
            name = self._graph.edges[left, right]["nodes"][0]
            source = source_of(by_name[name])
            steps.append(
                f"{left[0]}:{left[1]} - {right[0]}:{right[1]} by {name} "
                f"[{by_name[name].target}]  {source}".rstrip()
            )
        return steps

    def freezing(self, names: Iterable[str], why: str) -> CouplingGraph:
        """The same analysis with some groups frozen (inside the network, so of kind host)."""
        chosen = set(names)
        frozen = dict(self.frozen)
        for group in self.groups:
            if group.name in chosen:
                for place, rows in group.index.items():
                    before = frozen[place].indices if place in frozen else np.empty(0, np.int64)
                    indices = np.union1d(before, rows.reshape(-1))
                    frozen[place] = FrozenReason(Kind.HOST, why, "", "", indices)
        groups = tuple(g for g in self.groups if g.name not in chosen)
        return replace(
            self,
            groups=groups,
            frozen=frozen,
            free_fraction=_free_fraction(self.captured, groups),
        )


def analyze(
    model: nn.Module | ExportedProgram | Captured,
    example_inputs: Any = (),
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
) -> CouplingGraph:
    """Finds the coupling groups of a network.

    Args:
        model: What `fxfuse.capture` takes, or its result.
        example_inputs: A tensor or a tuple of positional inputs, batch of at least 2.
        example_kwargs: Keyword inputs.
        dynamic_shapes: Passed to `torch.export.export` unchanged.

    Returns:
        Groups, frozen dimensions and explanations.

    Raises:
        ExampleInputError: The model rejects the example inputs.
        CaptureError: The model cannot be captured.
    """
    captured = model
    if not isinstance(captured, Captured):
        captured = capture(captured, example_inputs, example_kwargs, dynamic_shapes=dynamic_shapes)
    missing = captured.unreached()
    if missing:
        warnings.warn(
            f"the example inputs do not reach {', '.join(missing)}: nothing is known of these, and "
            "they count as frozen. Pass an example that reaches them.",
            stacklevel=2,
        )
    ledger, values = interpret(captured)
    component = ledger.components()
    stuck = _frozen_components(ledger, component)
    groups = _groups(captured, ledger, component, stuck.mask)
    return CouplingGraph(
        captured,
        groups,
        _frozen_places(captured, ledger, component, stuck),
        tuple(_mixing_notes(ledger, component, stuck)),
        _free_fraction(captured, groups),
        frozenset(ledger.readers),
        frozenset(ledger.writers),
        values,
        ledger,
    )


@dataclass(frozen=True)
class _Frozen:
    """What of the network's components is frozen.

    Attributes:
        kind: int8 [components]: index into `_KINDS`, -1 where free.
        freeze: int64 [components]: index of the first freeze of that kind.
    """

    kind: NDArray[np.int8]
    freeze: Index

    @property
    def mask(self) -> NDArray[np.bool_]:
        """Bool [components]."""
        return self.kind >= 0


_KINDS = (Kind.HOST, Kind.OUTPUT, Kind.COMMON)


def _frozen_components(ledger: Ledger, component: Index) -> _Frozen:
    """Kind and first reason of every frozen component."""
    size = int(component.max(initial=0)) + 1
    first = np.full((len(_KINDS), size), -1, dtype=np.int64)
    # Backwards, so that the first reason is the one that stays.
    for number, freeze in reversed(list(enumerate(ledger.freezes))):
        first[_KINDS.index(freeze.kind), component[freeze.ids]] = number
    read = np.zeros(size, dtype=bool)
    for place in ledger.readers:
        read[component[_ids_of(ledger, ledger.owners.index(place))]] = True
    kind = np.full(size, -1, dtype=np.int8)
    for number in reversed(range(len(_KINDS))):
        kind[first[number] >= 0] = number
    # An output that nothing inside reads is the members' mean, whatever it passes.
    output = _KINDS.index(Kind.OUTPUT)
    kind[(first[output] >= 0) & ~read] = output
    return _Frozen(kind, np.take_along_axis(first, np.maximum(kind, 0)[None], axis=0)[0])


def _ids_of(ledger: Ledger, owner: int) -> Index:
    start = ledger.starts[owner]
    end = ledger.starts[owner + 1] if owner + 1 < len(ledger.starts) else ledger.count
    return np.arange(start, end)


def _is_real(place: Place) -> bool:
    return not place[0].startswith("<")


def _groups(
    captured: Captured,
    ledger: Ledger,
    component: Index,
    frozen: NDArray[np.bool_],
) -> tuple[CouplingGroup, ...]:
    """Free components are units; those of one structure are a group."""
    parts = ledger.slots(component)
    structure = ledger.structure(component, parts)
    places = [(p, _ids_of(ledger, owner)) for owner, p in enumerate(ledger.owners) if _is_real(p)]
    appeared = np.full(len(frozen), len(places))
    for number, (_, ids) in reversed(list(enumerate(places))):
        appeared[component[ids]] = number
    appeared[frozen] = len(places)
    units = np.flatnonzero(appeared < len(places))
    units = units[np.argsort(appeared[units], kind="stable")]
    _, first, group = np.unique(structure[units], return_index=True, return_inverse=True)
    # Groups are numbered in the order in which their first unit appears.
    group = np.argsort(np.argsort(first))[group]
    sizes = np.bincount(group, minlength=len(first))
    group_of, unit_of = np.full(len(frozen), -1), np.full(len(frozen), -1)
    group_of[units] = group
    together = np.argsort(group, kind="stable")
    unit_of[units[together]] = np.arange(len(units)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    aliases = defaultdict(list)
    for name, canonical in captured.canonical.items():
        aliases[canonical].append(name)
    indexes: list[dict[Place, Index]] = [{} for _ in sizes]
    for (name, dim), ids in places:
        owned = group_of[component[ids]]
        # Slots of two units correspond when they play the same part, whatever their index.
        order = np.lexsort((parts[ids], unit_of[component[ids]], owned))
        numbers, starts = np.unique(owned[order], return_index=True)
        for number, rows in zip(numbers, np.split(order, starts[1:]), strict=True):
            if number >= 0:
                for alias in aliases[name]:
                    indexes[number][(alias, dim)] = rows.reshape(sizes[number], -1)
    groups, taken = [], set[str]()
    for n_units, index in zip(sizes.tolist(), indexes, strict=True):
        leader = next(iter(index))
        name = f"{leader[0]}:{leader[1]}"
        number = 2
        while name in taken:
            name = f"{leader[0]}:{leader[1]}#{number}"
            number += 1
        taken.add(name)
        groups.append(CouplingGroup(name, n_units, index))
    return tuple(groups)


def _frozen_places(
    captured: Captured,
    ledger: Ledger,
    component: Index,
    stuck: _Frozen,
) -> dict[Place, FrozenReason]:
    by_owner: dict[Place, Index] = {}
    for owner, place in enumerate(ledger.owners):
        by_owner[place] = component[_ids_of(ledger, owner)]
    reached = captured.reached()
    frozen: dict[Place, FrozenReason] = {}
    for name, first in captured.canonical.items():
        tensor = captured.tensor(name)
        for dim, size in enumerate(tensor.shape):
            members = by_owner.get((first, dim))
            everything = np.arange(size)
            if is_constant(tensor):
                why = "an integer or boolean buffer is a constant of the network"
                frozen[(name, dim)] = FrozenReason(Kind.COMMON, why, "", "", everything)
            elif first not in reached:
                why = "the captured graph does not read this tensor"
                frozen[(name, dim)] = FrozenReason(Kind.COMMON, why, "", "", everything)
            elif members is None:
                why = "size 1: there is nothing to permute"
                frozen[(name, dim)] = FrozenReason(Kind.COMMON, why, "", "", everything)
            else:
                indices = np.flatnonzero(stuck.mask[members])
                if len(indices):
                    first_one = members[indices[0]]
                    kind = _KINDS[stuck.kind[first_one]]
                    freeze = ledger.freezes[stuck.freeze[first_one]]
                    node, source = ("", "")
                    if freeze.node is not None:
                        node, source = freeze.node.name, source_of(freeze.node)
                    frozen[(name, dim)] = FrozenReason(kind, freeze.why, node, source, indices)
    return frozen


def _mixing_notes(ledger: Ledger, component: Index, stuck: _Frozen) -> Iterable[MixingNote]:
    averaged = stuck.kind == _KINDS.index(Kind.OUTPUT)
    seen: set[tuple[str, str]] = set()
    for note in ledger.mixings:
        if note.ids is not None and not averaged[component[note.ids]].any():
            continue
        node = note.node.name if note.node is not None else ""
        if (node, note.why) not in seen:
            seen.add((node, note.why))
            yield _note(note, node)


def _note(note: Mixing, node: str) -> MixingNote:
    source = source_of(note.node) if note.node is not None else ""
    return MixingNote(note.why, node, source, note.sources)


def _free_fraction(captured: Captured, groups: Iterable[CouplingGroup]) -> float:
    free = {captured.canonical[name] for group in groups for name, _ in group.index}
    total = inside = 0
    for name in captured.reached():
        tensor = captured.tensor(name)
        if isinstance(tensor, nn.Parameter):
            total += tensor.numel()
            inside += tensor.numel() if name in free else 0
    return inside / total if total else 0.0


def _networkx(graph: CouplingGraph) -> nx.Graph:
    ledger = graph.ledger
    result: nx.Graph = nx.Graph()
    for owner, place in enumerate(ledger.owners):
        result.add_node(
            place,
            size=len(_ids_of(ledger, owner)),
            groups=[g.name for g in graph.group_of.get(place, ())],
            frozen=graph.frozen[place].why if place in graph.frozen else "",
        )
    for a, b, node in ledger.ties:
        pairs = np.stack([ledger.owner_positions(a), ledger.owner_positions(b)], axis=1)
        for left, right in np.unique(pairs, axis=0).tolist():
            if left == right or node is None:
                continue
            u, v = ledger.owners[left], ledger.owners[right]
            if not result.has_edge(u, v):
                result.add_edge(u, v, nodes=[])
            if node.name not in result.edges[u, v]["nodes"]:
                result.edges[u, v]["nodes"].append(node.name)
    return result
