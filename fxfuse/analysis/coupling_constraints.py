"""The constraints: who owns neurons, which neurons move together, which must stay where they are.

The rules write into it; coupling groups are read off it. Words are those of `labels.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import fx

from fxfuse.analysis import labels
from fxfuse.analysis.labels import (
    NEURON,
    PART,
    AbstractTensor,
    DimLabels,
    Ids,
    Kind,
    Place,
    Repeating,
    counted,
    distinct,
    flat_ids,
    neurons,
    numbered,
)


@dataclass(frozen=True)
class Freeze:
    """A note that some neurons must stay where they are.

    Attributes:
        ids: The neurons, int64 [n].
        kind: What that means for fusion.
        why: One sentence.
        node: The graph node that needs it; None for what was asked for.
        operator: The operator whose rule is missing, when that is the reason.
        inside: Whether the reason lies inside the network, so that a rule, or another way to write
            the network, could free the neurons; always so for `Kind.KEEP_BASE`.
        asked: Whether it was asked for by an option, not needed by an operator.
    """

    ids: NDArray[np.int64]
    kind: Kind
    why: str
    node: fx.Node | None
    operator: str = ""
    inside: bool = False
    asked: bool = False


@dataclass(frozen=True)
class Gap:
    """A note that labelled neurons or parameters met an operator that the rules do not cover.

    Attributes:
        node: Where.
        has_rule: Whether the operator has a rule, which does not cover this use.
    """

    node: fx.Node
    has_rule: bool


@dataclass(frozen=True)
class Mixing:
    """A note that an operator mixes members that are put side by side.

    Attributes:
        why: What mixes.
        node: Where.
        sources: When not empty, it mixes only if members disagree on one of these parameters.
        ids: When given, it mixes only if one of these neurons is averaged (an output).
    """

    why: str
    node: fx.Node | None
    sources: frozenset[str] = frozenset()
    ids: NDArray[np.int64] | None = None


#: Neurons, those that move together with them, and the graph node that ties them.
Tie = tuple[NDArray[np.int64], NDArray[np.int64], fx.Node | None]


@dataclass
class CouplingConstraints:
    """Everything that was found out about neurons: who owns them, who is tied to whom.

    The rules in `fxfuse.analysis.rules` write into it; `fxfuse.analysis.coupling` reads it.
    `keeps_groups` names grouped convolutions and group norms whose groups stay where they are, so
    that the channels within a group are the units; elsewhere a group is one.
    """

    owners: list[Place] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    count: int = 1
    ties: list[Tie] = field(default_factory=list)
    strands: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = field(default_factory=list)
    orders: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = field(default_factory=list)
    deferred: list[tuple[DimLabels, DimLabels, bool, fx.Node | None]] = field(default_factory=list)
    freezes: list[Freeze] = field(default_factory=list)
    mixings: list[Mixing] = field(default_factory=list)
    gaps: list[Gap] = field(default_factory=list)
    touches: list[tuple[DimLabels, int]] = field(default_factory=list)
    readers: set[Place] = field(default_factory=set)
    writers: set[Place] = field(default_factory=set)
    node: fx.Node | None = None
    clock: int = 0
    keeps_groups: frozenset[str] = frozenset()
    _stays: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, dtype=bool))

    def parameter(self, name: str, shape: Sequence[int]) -> AbstractTensor:
        """Return a parameter or float buffer, with fresh ids along each of its dimensions."""
        fields = []
        for dim, size in enumerate(shape):
            if size > 1:
                fields.append(numbered(shape, dim, self.fresh(size, (name, dim))))
        return AbstractTensor(tuple(shape), tuple(fields), (), frozenset({name}))

    def fresh(self, size: int, owner: Place) -> int:
        """Reserve `size` ids for an owner; return the first."""
        start = self.count
        self.owners.append(owner)
        self.starts.append(start)
        self.count += size
        return start

    def owner_positions(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Index into `owners` for each id."""
        found: NDArray[np.int64] = np.searchsorted(np.asarray(self.starts), ids, side="right") - 1
        return found

    def ids_of(self, owner: int) -> NDArray[np.int64]:
        """Return the ids that an owner, given by its index into `owners`, has."""
        end = self.starts[owner + 1] if owner + 1 < len(self.starts) else self.count
        return np.arange(self.starts[owner], end)

    def owners_of(self, ids: Ids) -> set[Place]:
        """Return the (tensor, dim) pairs that own the given ids."""
        flat = distinct(flat_ids(neurons(ids)))
        return {self.owners[i] for i in np.unique(self.owner_positions(flat[flat > 0]))}

    # --- what rules say -------------------------------------------------------------------------

    def tie(self, a: Ids, b: Ids) -> None:
        """Neurons at the same place of `a` and `b` (broadcast) move together; 0 ties nothing."""
        left, right = torch.broadcast_tensors(a, b)
        x, y = flat_ids(left), flat_ids(right)
        real = (x > 0) & (y > 0) & (x != y)
        if real.any():
            x, y = x[real], y[real]
            ties = x & NEURON, y & NEURON
            if len(x) > labels.LARGE:
                # Neurons that stay form no groups, so nobody asks how they are tied.
                loose = ~(self.stay(ties[0]) | self.stay(ties[1]))
                x, y, ties = x[loose], y[loose], _each_once(*ties)
            if len(x):
                self.strands.append((x, y))
            self.ties.append((*ties, self.node))

    def tie_fields(self, f: DimLabels, g: DimLabels) -> None:
        """Neurons at the same place of two fields move together."""
        if f is g:
            return
        if self._is_settled(f) and self._is_settled(g) and f.shape == g.shape:
            self.tie(*f.beside(g))
        else:
            self.tie(f.ids, g.ids)

    def _is_settled(self, f: DimLabels) -> TypeGuard[Repeating]:
        """Tell whether a field has a table, and neurons that stay, whose parts nobody asks for."""
        return isinstance(f, Repeating) and bool(self.stay(f.held).all())

    def block(self, f: DimLabels, dims: Iterable[int]) -> None:
        """All neurons along `dims` become one unit, in order."""
        dims, stride = tuple(dims), 1
        if self._is_settled(f):
            rows = DimLabels(neurons(f.table), f.dims)
            self.tie(rows.first(dims), rows.ids)
            return
        ids = f.ids
        self.tie(f.first(dims), ids)
        order = torch.zeros_like(ids)
        for dim in dims:
            size = ids.shape[dim]
            line = torch.arange(size).reshape([-1 if d == dim else 1 for d in range(ids.dim())])
            order, stride = order + line * stride, stride * size
        self.orders.append((flat_ids(ids), flat_ids(order)))

    def tell_apart(self, f: DimLabels, dim: int) -> None:
        """Neurons that differ along a dimension are no longer interchangeable with one another."""
        if dim in f.dims:
            place = numbered(f.shape, dim, 0).ids.expand(f.shape)
            self.orders.append((flat_ids(f.ids), flat_ids(place)))

    def freeze(
        self, f: DimLabels, kind: Kind, why: str, *, operator: str = "", inside: bool = False
    ) -> None:
        """The neurons of a field stay where they are (the arguments are those of `Freeze`)."""
        inside = inside or kind is Kind.KEEP_BASE
        if len(self._stays) < self.count:
            self._stays = np.pad(self._stays, (0, 2 * self.count - len(self._stays)))
        self._stays[f.held] = True
        self.freezes.append(Freeze(f.held, kind, why, self.node, operator, inside))

    def stay(self, ids: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Tell which neurons are frozen themselves already, whatever they are tied to."""
        found = np.zeros(len(ids), dtype=bool)
        known = ids < len(self._stays)
        found[known] = self._stays[ids[known]]
        return found

    def settled(self, value: AbstractTensor) -> AbstractTensor:
        """Return the same value, in which large fields of neurons that stay take less room."""
        if not any(isinstance(f, Repeating) for f in value.fields):
            return value
        fields = (f.settled() if self._is_settled(f) else f for f in value.fields)
        return replace(value, fields=tuple(fields))

    def ask(self, tensor: str, kind: Kind, why: str) -> None:
        """All neurons of a parameter stay where they are, because it was asked for."""
        for owner, (name, _) in enumerate(self.owners):
            if name == tensor:
                self.freezes.append(Freeze(self.ids_of(owner), kind, why, None, asked=True))

    def mix(
        self,
        why: str,
        sources: frozenset[str] = frozenset(),
        ids: Ids | DimLabels | None = None,
    ) -> None:
        """Members put side by side no longer give the mean of the members after this operator."""
        if isinstance(ids, DimLabels):
            flat: NDArray[np.int64] | None = ids.held
        else:
            flat = None if ids is None else distinct(flat_ids(neurons(ids)))
        self.mixings.append(Mixing(why, self.node, sources, flat))

    def record_use(self, value: AbstractTensor, tag: int = 0) -> None:
        """Neurons of `value` pass through the current operator (part of a unit's signature)."""
        self.touches += [(f, 2 * self.clock + tag) for f in value.fields]

    def role(self, value: AbstractTensor, f: DimLabels, *, reader: bool) -> None:
        """Note on which side of its tensor a parameter's field is used."""
        if value.is_parameter:
            (self.readers if reader else self.writers).update(self.owners_of(f.ids))

    # --- what follows ---------------------------------------------------------------------------

    def components(self) -> NDArray[np.int64]:
        """Return the connected component of each id; settles the ties that depend on blocks."""
        pending = self.deferred
        self.deferred = []
        component = self._connect()
        for small, large, is_parameter, node in pending:
            self.node = node
            if _is_blocked(component, small, large):
                self.freeze(
                    small,
                    Kind.SHARED_INDEX if is_parameter else Kind.KEEP_BASE,
                    "one index is shared by several units that each need it in order",
                    inside=True,
                )
            else:
                # What `large` has more of stays in order: two outputs of a depthwise channel, say.
                self.block(large, sorted(set(large.dims) - set(small.dims)))
                self.tie_fields(small, large)
        self.node = None
        return self._connect() if pending else component

    def joined_by(self, first: int, second: int) -> fx.Node | None:
        """Return the node whose ties made one unit of two neurons; None if they are two units."""
        low, high = 0, len(self.ties)
        while low < high:
            middle = (low + high) // 2
            component = _connected(self.ties[: middle + 1], self.count)
            if component[first] == component[second]:
                high = middle
            else:
                low = middle + 1
        return self.ties[low][2] if low < len(self.ties) else None

    def slots(self, component: NDArray[np.int64], frozen: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Number the neurons of one owner in each unit: equal numbers should correspond.

        Neurons correspond when they play the same part in their units: the same owner, the same
        place in every block, the same operators passed, tied in the same way to neurons that
        correspond (colour refinement). Where that tells nothing, their indices decide;
        `structure` says whether the units are alike under this numbering. The neurons of `frozen`
        components, which are no units, get no numbers.
        """
        owner = self.owner_positions(np.arange(self.count))
        keys, counts = np.unique(component * len(self.owners) + owner, return_counts=True)
        # Units with one slot in each place have no order to find.
        several = np.zeros(int(component.max(initial=0)) + 1, dtype=bool)
        several[keys[counts > 1] // len(self.owners)] = True
        wanted = (several & ~frozen)[component]
        colour = self._seen(_scramble(owner.astype(np.uint64)), wanted)
        ends = [
            self._labelled(*strand, number, wanted) for number, strand in enumerate(self.strands)
        ]
        ends = [e for e in ends if len(e[0])]
        known = 0
        while known < (found := len(np.unique(colour[wanted]))):
            known = found
            around = np.zeros_like(colour)
            for x, y, forth, back in ends:
                np.add.at(around, x, _scramble(colour[y] ^ forth))
                np.add.at(around, y, _scramble(colour[x] ^ back))
            colour = _scramble(colour + _scramble(around))
        chosen = np.flatnonzero(wanted)
        place = np.stack([component, owner])[:, chosen]
        order = np.lexsort((_ranks(colour[chosen]), place[1], place[0]))
        slot = np.zeros_like(owner)
        slot[chosen[order]] = counted(place[:, order])
        return slot

    def structure(
        self,
        component: NDArray[np.int64],
        slots: NDArray[np.int64],
        frozen: NDArray[np.bool_],
    ) -> NDArray[np.uint64]:
        """Return for each unit, a hash of all that was found out about its slots.

        Two units with the same hash are interchangeable slot by slot: every operator treats their
        slots alike, and the slots are tied alike. That of a `frozen` component says nothing.
        """
        wanted = ~frozen[component]
        owner = self.owner_positions(np.arange(self.count))
        slot = _scramble((owner << PART | slots).astype(np.uint64))
        result = np.zeros(int(component.max(initial=0)) + 1, dtype=np.uint64)
        np.add.at(result, component, _scramble(self._seen(slot, wanted)))
        for number, strand in enumerate(self.strands):
            x, y, forth, _ = self._labelled(*strand, number, wanted)
            # Which end of a strand is which shows in its label.
            np.add.at(result, component[x], _scramble(_scramble(slot[x] ^ forth) + slot[y]))
        return result

    def _seen(self, colour: NDArray[np.uint64], wanted: NDArray[np.bool_]) -> NDArray[np.uint64]:
        """Add to the colour of the neurons wanted what the operators saw of the neuron itself."""
        colour = colour.copy()
        for f, tag in self.touches:
            if isinstance(f, Repeating) and not wanted[f.held].any():
                continue
            ids, counts = f.tally
            seen = counts.astype(np.uint64) * _scramble(_key(2 * tag, ids >> PART))
            np.add.at(colour, ids & NEURON, seen)
        for number, (ids, order) in enumerate(self.orders):
            place = _scramble(_key(2 * number + 1, ids >> PART)) + order.astype(np.uint64)
            np.add.at(colour, ids & NEURON, _scramble(place))
        return colour

    def _labelled(
        self,
        x: NDArray[np.int64],
        y: NDArray[np.int64],
        number: int,
        wanted: NDArray[np.bool_],
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.uint64], NDArray[np.uint64]]:
        """Both ends of a strand, and its label as seen from either: which tie, which parts."""
        kept = wanted[x & NEURON]
        x, y = x[kept], y[kept]
        forth = _scramble(_scramble(_key(2 * number, x >> PART)) + (y >> PART).astype(np.uint64))
        return x & NEURON, y & NEURON, forth, ~forth

    def _connect(self) -> NDArray[np.int64]:
        return _connected(self.ties, self.count)


def _connected(ties: Sequence[Tie], count: int) -> NDArray[np.int64]:
    if not ties:
        return np.arange(count)
    a = np.concatenate([x for x, _, _ in ties])
    b = np.concatenate([y for _, y, _ in ties])
    graph = coo_array((np.ones(len(a), dtype=np.int8), (a, b)), shape=(count, count))
    _, component = connected_components(graph, directed=False)
    return np.asarray(component, dtype=np.int64)


def _each_once(
    x: NDArray[np.int64], y: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return each pair of neurons once."""
    left, right = distinct(x), distinct(y)
    # Numbered within what appears, few pairs are possible and need no sorting.
    pairs = distinct(np.searchsorted(left, x) * len(right) + np.searchsorted(right, y))
    return left[pairs // len(right)], right[pairs % len(right)]


def _scramble(keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return a 64-bit hash (splitmix64), so that sums of colours tell multisets apart."""
    with np.errstate(over="ignore"):
        x = keys.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def _key(number: int, part: NDArray[np.int64]) -> NDArray[np.uint64]:
    return (part << PART | number).astype(np.uint64)


def _ranks(colours: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Colour as small numbers, in the order in which they first appear."""
    _, first, inverse = np.unique(colours, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse].astype(np.int64)


def _is_blocked(component: NDArray[np.int64], small: DimLabels, large: DimLabels) -> bool:
    """Tell whether `large` is tied along the dimensions of `small`: then `small` is an order in it.

    A single unit shares the order with nobody.
    """
    grouped = component[neurons(large.ids).numpy()]
    if bool((grouped == grouped.flat[0]).all()):
        return False
    dims = [d for d in small.dims if large.ids.shape[d] > 1]
    return all(bool((grouped == grouped.take([0], axis=d)).all()) for d in dims)
