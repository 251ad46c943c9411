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
from fxfuse.controls import (
    Asked,
    Controls,
    OutputDims,
    Patterns,
    asked_for,
    contradiction,
    interface_dims,
)
from fxfuse.errors import UnknownTensorError
from fxfuse.heads import region_of
from fxfuse.interpreter import interpret
from fxfuse.labels import Freeze, Kind, Ledger, Mixing

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
        asked: What options asked for, by canonical tensor name.
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
    asked: Mapping[str, Asked] = field(default_factory=dict)

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

    def trunk(self) -> CouplingGraph:
        """The same analysis with groups of which the members' own heads are no part."""
        if not self.captured.heads:
            return self
        heads = self.captured.heads

        def without_heads(group: CouplingGroup) -> CouplingGroup:
            kept = {place: rows for place, rows in group.index.items() if place[0] not in heads}
            return replace(group, index=kept)

        return replace(self, groups=tuple(without_heads(g) for g in self.groups))

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
    freeze: Patterns = (),
    share: Patterns = (),
    ignore: Patterns = (),
    output_dims: OutputDims | None = None,
    dynamic_shapes: Any = None,
) -> CouplingGraph:
    """Finds the coupling groups of a network.

    Patterns are those of `fnmatch`; one may stand without a list.

    Args:
        model: What `fxfuse.capture` takes, or its result.
        example_inputs: A tensor or a tuple of positional inputs, batch of at least 2.
        example_kwargs: Keyword inputs.
        freeze: `state_dict()` names of parameters that stay exactly as in the host. Every
            dimension freezes, and what is coupled to it follows: the host keeps it. A dimension
            that means the same in all members anyhow (input channels, tokens) draws nothing in.
        share: `state_dict()` names of parameters whose index means the same in all members (a
            pretrained stem that all members hold): the members' mean is taken, along with
            whatever is coupled to it, and the plan lists how far they disagree.
        ignore: Dotted paths of submodules of which nothing is fused: all their parameters and
            buffers are frozen as by `freeze`.
        output_dims: For an output, by its index in flattened order, the dimensions that are
            interface: `{0: ()}` sets all dimensions of the first output free, so that its channels
            may be permuted and fused. An output that is not listed is interface in every
            dimension.
        dynamic_shapes: Passed to `torch.export.export` unchanged.

    Returns:
        Groups, frozen dimensions and explanations.

    Raises:
        ExampleInputError: The model rejects the example inputs.
        CaptureError: The model cannot be captured.
        ControlError: An option names nothing in the network, or two contradict each other.
    """
    captured = model
    if not isinstance(captured, Captured):
        captured = capture(captured, example_inputs, example_kwargs, dynamic_shapes=dynamic_shapes)
    return couple(captured, Controls.of(freeze, share, ignore, output_dims))


def couple(captured: Captured, controls: Controls) -> CouplingGraph:
    """Finds the coupling groups of a captured network.

    Args:
        captured: The network.
        controls: The options of `analyze`.

    Raises:
        ControlError: An option names nothing in the network, or two contradict each other.
    """
    asked = asked_for(captured, controls)
    missing = captured.unreached(excused(asked))
    if missing:
        warnings.warn(
            f"the example inputs do not reach {', '.join(missing)}: nothing is known of these, and "
            "they count as frozen. Pass an example that reaches them.",
            stacklevel=3,
        )
    ledger, values = interpret(captured, interface_dims(captured, controls))
    for name, wish in asked.items():
        ledger.ask(name, wish.kind, wish.why)
    component = ledger.components()
    stuck = _frozen_components(ledger, component, _inside_heads(captured, ledger, component))
    groups = _groups(captured, ledger, component, stuck.mask)
    frozen = _frozen_places(captured, ledger, component, stuck, asked)
    notes = [
        *_mixing_notes(ledger, component, stuck),
        *_shared_writers(captured, groups, frozen, ledger.readers, asked),
    ]
    return CouplingGraph(
        captured,
        groups,
        frozen,
        tuple(notes),
        _free_fraction(captured, groups),
        frozenset(ledger.readers),
        frozenset(ledger.writers),
        values,
        ledger,
        asked,
    )


def excused(asked: Mapping[str, Asked]) -> frozenset[str]:
    """Tensors that stay the host's as they are, so that nothing has to be known of them."""
    return frozenset(name for name, wish in asked.items() if wish.kind is Kind.HOST)


@dataclass(frozen=True)
class _Frozen:
    """What of the network's components is frozen.

    Attributes:
        kind: int8 [components]: index into `_KINDS`, -1 where free.
        reason: int64 [components]: index into `reasons`.
        reasons: Why something is frozen.
    """

    kind: NDArray[np.int8]
    reason: Index
    reasons: tuple[Freeze, ...]

    @property
    def mask(self) -> NDArray[np.bool_]:
        """Bool [components]."""
        return self.kind >= 0

    def of(self, component: int) -> Freeze:
        """Why a component is frozen; of the kind that decides."""
        freeze = self.reasons[int(self.reason[component])]
        return replace(freeze, kind=_KINDS[int(self.kind[component])])


_KINDS = (Kind.HOST, Kind.OUTPUT, Kind.COMMON)
#: Where an index means the same in all members anyhow, a wish concerns its tensor alone.
_SPARED = {Kind.HOST: Kind.COMMON, Kind.COMMON: Kind.OUTPUT}
_HEAD = Freeze(np.empty(0, np.int64), Kind.COMMON, "lies inside the head of one member", None)


def _frozen_components(ledger: Ledger, component: Index, heads: NDArray[np.bool_]) -> _Frozen:
    """Kind and first reason of every frozen component.

    Args:
        ledger: What was found out.
        component: The component of each id.
        heads: bool [components]: those that only heads have.

    Raises:
        ControlError: A component is to be the host's and shared at once.
    """
    size = len(heads)
    needed = np.full((len(_KINDS), size), -1, dtype=np.int64)
    wished = needed.copy()
    # Backwards, so that the first reason is the one that stays.
    for number, freeze in reversed(list(enumerate(ledger.freezes))):
        table = wished if freeze.asked else needed
        table[_KINDS.index(freeze.kind), component[freeze.ids]] = number
    read = np.zeros(size, dtype=bool)
    for place in ledger.readers:
        read[component[ledger.ids_of(ledger.owners.index(place))]] = True
    kind = np.full(size, -1, dtype=np.int8)
    for number in reversed(range(len(_KINDS))):
        kind[needed[number] >= 0] = number
    # An output that nothing inside reads is the members' mean, whatever it passes.
    output = _KINDS.index(Kind.OUTPUT)
    kind[(needed[output] >= 0) & ~read] = output
    reason = np.take_along_axis(needed, np.maximum(kind, 0)[None], axis=0)[0]
    granted = {
        k: (wished[_KINDS.index(k)] >= 0) & (kind != _KINDS.index(spared))
        for k, spared in _SPARED.items()
    }
    torn = np.flatnonzero(np.logical_and(*granted.values()))
    if len(torn):
        wishes = [ledger.freezes[wished[_KINDS.index(k), torn[0]]] for k in granted]
        places = [ledger.owners[int(ledger.owner_positions(w.ids)[0])] for w in wishes]
        where = " is coupled with ".join(f"{name}:{dim}" for name, dim in places)
        raise contradiction(where, *(w.why for w in wishes))
    for k, mask in granted.items():
        kind[mask] = _KINDS.index(k)
        reason[mask] = wished[_KINDS.index(k)][mask]
    kind[heads], reason[heads] = _KINDS.index(_HEAD.kind), len(ledger.freezes)
    return _Frozen(kind, reason, (*ledger.freezes, _HEAD))


def _inside_heads(captured: Captured, ledger: Ledger, component: Index) -> NDArray[np.bool_]:
    """Components that only heads have: a head keeps its member's order in them."""
    size = int(component.max(initial=0)) + 1
    heads, trunk = np.zeros(size, dtype=bool), np.zeros(size, dtype=bool)
    if not captured.heads:
        return heads
    inner = {f"<{node.name}>" for node in region_of(captured, captured.heads)}
    for owner, (name, _) in enumerate(ledger.owners):
        own = name in captured.heads or name in inner
        (heads if own else trunk)[component[ledger.ids_of(owner)]] = True
    return heads & ~trunk


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
    places = [(p, ledger.ids_of(owner)) for owner, p in enumerate(ledger.owners) if _is_real(p)]
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
    asked: Mapping[str, Asked],
) -> dict[Place, FrozenReason]:
    by_owner: dict[Place, Index] = {}
    for owner, place in enumerate(ledger.owners):
        by_owner[place] = component[ledger.ids_of(owner)]
    reached = captured.reached()
    frozen: dict[Place, FrozenReason] = {}
    for name, first in captured.canonical.items():
        tensor = captured.tensor(name)
        for dim, size in enumerate(tensor.shape):
            members = by_owner.get((first, dim))
            everything = np.arange(size)
            wish = asked.get(first)
            if wish is not None:
                frozen[(name, dim)] = FrozenReason(wish.kind, wish.why, "", "", everything)
            elif is_constant(tensor):
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
                    freeze = stuck.of(int(members[indices[0]]))
                    node, source = ("", "")
                    if freeze.node is not None:
                        node, source = freeze.node.name, source_of(freeze.node)
                    frozen[(name, dim)] = FrozenReason(
                        freeze.kind, freeze.why, node, source, indices
                    )
    return frozen


def _shared_writers(
    captured: Captured,
    groups: Iterable[CouplingGroup],
    frozen: Mapping[Place, FrozenReason],
    readers: set[Place],
    asked: Mapping[str, Asked],
) -> Iterable[MixingNote]:
    """What the members' own units add to a shared dimension is averaged."""
    shared = {wish.why for wish in asked.values() if wish.kind is Kind.COMMON}
    free = {place for group in groups for place in group.index}
    for name, dim in sorted(free):
        if (name, dim) not in readers:
            continue
        reasons = (frozen.get((name, d)) for d in range(captured.tensor(name).dim()))
        why = next((r.why for r in reasons if r is not None and r.why in shared), "")
        if why:
            node = next(n for n in captured.graph.nodes if n.op == "get_attr" and n.target == name)
            user = next(iter(node.users))
            yield MixingNote(f"members are averaged in what is {why}", user.name, source_of(user))


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
            size=len(ledger.ids_of(owner)),
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
