"""Neuron labels: which neuron sits at which index of a tensor, and which neurons move together.

Notation used in this package: an *id* is the number of a neuron (0: no neuron, padding). A *field*
is a labelling of one tensor: ids that vary along some of its dimensions and not along the others,
stored as an int64 tensor of full rank with size 1 along the others. A tensor can have several
fields (the weight of a linear layer has one per dimension). Dimensions of size 1 carry no field:
there is nothing to permute.

One neuron can stand at several places of a field: a channel that was flattened with its pixels, a
layer's output that is used twice. Then each place has a *part* of its own, in the high bits of the
id (`neurons` strips it), so that parameters that meet different places can be told apart. Parts
are numbered alike for all neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import fx

Ids = torch.Tensor
#: A dimension of a named tensor.
Place = tuple[str, int]
#: Indices along a dimension, or numbers of components: int64.
Index = NDArray[np.int64]

#: Where the part begins in an id.
_PART = 32
_NEURON = (1 << _PART) - 1


class Kind(StrEnum):
    """What a frozen dimension means for fusion (docs/adr/0002-freeze-by-default.md)."""

    #: The index has one meaning for all members: input channels, kernel positions, tokens.
    COMMON = "common"
    #: The network's output: the members' mean is taken.
    OUTPUT = "output"
    #: A dimension inside the network in which members' neurons do not correspond: one member, the
    #: host, keeps the whole connected piece.
    HOST = "host"


@dataclass(frozen=True)
class Field:
    """Ids of the neurons along some dimensions of a tensor.

    Attributes:
        ids: int64, full rank, size 1 along dimensions that the ids do not vary along.
        dims: The dimensions along which the ids vary.
    """

    ids: Ids
    dims: tuple[int, ...]

    @cached_property
    def tally(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The ids that are neurons, and how often each stands in the field; int64 [n] both."""
        ids = _flat(self.ids)
        if not len(ids):
            return ids, ids
        first = int(ids.min())
        if int(ids.max()) - first > 4 * len(ids):
            found, counts = np.unique(ids, return_counts=True)
        else:
            line = np.bincount(ids - first)
            found = np.flatnonzero(line)
            counts, found = line[found], found + first
        real = found > 0
        return found[real], counts[real]

    @staticmethod
    def of(ids: Ids, where: Callable[[], torch.Tensor] | None = None) -> Field | None:
        """Compresses ids: dimensions along which the neurons are the same get size 1.

        Args:
            ids: Ids of full rank.
            where: Gives int64 of the same shape that tells places of one neuron apart; asked only
                when a neuron stands at several places.
        """
        for dim, size in enumerate(ids.shape):
            if size > 1 and ids.stride(dim) == 0:
                ids = ids.narrow(dim, 0, 1)
        # Where nothing but the part varies, the places of a single neuron are all that is left.
        found = _compressed(ids, neurons(ids)) or _compressed(ids, ids)
        if found is None or where is None or _all_different(found.ids):
            return found
        told = where()
        for dim in range(told.dim()):
            if dim not in found.dims:
                told = told.narrow(dim, 0, 1)
        return Field(_with_parts(found.ids, told), found.dims)

    def first(self, dims: Iterable[int]) -> Ids:
        """One id for each block along `dims`: the first, which plays the same part in each.

        The first that is a neuron, that is: padding (id 0) stands for none.
        """
        ids = self.ids
        for dim in dims:
            ids = ids.gather(dim, (ids > 0).byte().argmax(dim, keepdim=True))
        return ids


def neurons(ids: Ids) -> Ids:
    """The neurons of ids, without their parts."""
    return ids & _NEURON


def _compressed(ids: Ids, told: Ids) -> Field | None:
    for dim, size in enumerate(ids.shape):
        if size > 1 and _is_constant_along(told.numpy(), dim):
            ids, told = ids.narrow(dim, 0, 1), told.narrow(dim, 0, 1)
    dims = tuple(d for d in range(ids.dim()) if ids.shape[d] > 1)
    return Field(ids.contiguous(), dims) if dims else None


def _all_different(ids: Ids) -> bool:
    real = ids[ids > 0]
    return len(torch.unique(real)) == len(real)


def _with_parts(ids: Ids, where: torch.Tensor) -> Ids:
    """Gives places of one neuron different parts: by its part so far, by where, by order."""
    flat = _flat(ids)
    part = flat >> _PART
    keys = np.stack([part, _flat(where.expand(ids.shape))])
    part = np.unique(keys, axis=1, return_inverse=True)[1].reshape(-1)
    told = np.stack([flat & _NEURON, part])
    order = np.lexsort(told)
    again = np.empty_like(flat)
    again[order] = _counted(told[:, order])
    part = np.unique(np.stack([part, again]), axis=1, return_inverse=True)[1].reshape(-1)
    found = np.where(flat > 0, (flat & _NEURON) | (part.astype(np.int64) << _PART), 0)
    return torch.from_numpy(found).reshape(ids.shape)


def _is_constant_along(ids: NDArray[np.int64], dim: int) -> bool:
    line = np.moveaxis(ids, dim, 0)
    # Where ids vary, they nearly always vary at once: the whole is compared only when it has to be.
    return all(bool((line[i] == line[0]).all()) for i in (1, -1)) and bool((line == line[0]).all())


@dataclass(frozen=True)
class Value:
    """What the analyzer knows about one tensor of the graph.

    Attributes:
        shape: Concrete shape (hints for symbolic sizes).
        fields: Neuron labels.
        positions: Unlabelled variation (batch, pixels, tokens, constants): like `fields`, but the
            ids only say where the content may differ.
        sources: Names of the parameters that it was computed from alone; None for a value that
            depends on the network's inputs.
        constant: The real tensor, when it depends on neither inputs nor parameters.
    """

    shape: tuple[int, ...]
    fields: tuple[Field, ...] = ()
    positions: tuple[Field, ...] = ()
    sources: frozenset[str] | None = None
    constant: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def is_parameter(self) -> bool:
        """Whether the value is computed from parameters alone."""
        return bool(self.sources)

    @property
    def unlabelled(self) -> frozenset[int]:
        """Dimensions along which unlabelled content varies."""
        return frozenset(d for f in self.positions for d in f.dims)

    def moved(self, operation: Callable[[torch.Tensor], torch.Tensor]) -> Value:
        """Applies a data-movement operator to every field, by running it on the ids.

        Args:
            operation: Takes a tensor of `shape` and returns one tensor.
        """
        shape: tuple[int, ...] = tuple(operation(torch.empty(()).expand(self.shape)).shape)

        def move(f: Field, tell: bool) -> Field | None:
            def where() -> torch.Tensor:
                # Along dimensions that the field does not have, the same neuron stands everywhere.
                sizes = [1 if d in f.dims else size for d, size in enumerate(self.shape)]
                return operation(torch.arange(prod(sizes)).reshape(sizes).expand(self.shape))

            return Field.of(operation(f.ids.expand(self.shape)), where if tell else None)

        fields = [move(f, True) for f in self.fields]
        places = [move(f, False) for f in self.positions]
        for before, after in zip(self.fields, fields, strict=True):
            if int(before.ids.max()) > _NEURON and after is not None:
                # Where only the part varies there is no label, but the content differs.
                part = Field.of(operation(before.ids.expand(self.shape)) >> _PART)
                places += positions(shape, set(part.dims if part else ()) - set(after.dims))
        return replace(
            self,
            shape=shape,
            fields=tuple(f for f in fields if f is not None),
            positions=tuple(f for f in places if f is not None),
            constant=None,
        )


def sources_of(values: Iterable[Value]) -> frozenset[str] | None:
    """Names of the parameters that values are computed from; None if one depends on inputs."""
    found = [value.sources for value in values]
    return None if None in found else frozenset[str]().union(*(s or () for s in found))


def positions(shape: Sequence[int], dims: Iterable[int]) -> tuple[Field, ...]:
    """Unlabelled variation along each of `dims`."""
    return tuple(_arange(shape, d, 1) for d in sorted(dims) if shape[d] > 1)


def _arange(shape: Sequence[int], dim: int, start: int) -> Field:
    view = [1] * len(shape)
    view[dim] = shape[dim]
    return Field(torch.arange(start, start + shape[dim]).view(view), (dim,))


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
            the network, could free the neurons; always so for `Kind.HOST`.
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


@dataclass
class Ledger:
    """Everything that was found out about neurons: who owns them, who is tied to whom.

    The rules in `fxfuse.rules` write into it; `fxfuse.coupling` reads it.
    """

    owners: list[Place] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    count: int = 1
    ties: list[tuple[NDArray[np.int64], NDArray[np.int64], fx.Node | None]] = field(
        default_factory=list
    )
    strands: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = field(default_factory=list)
    orders: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = field(default_factory=list)
    deferred: list[tuple[Field, Field, bool, fx.Node | None]] = field(default_factory=list)
    freezes: list[Freeze] = field(default_factory=list)
    mixings: list[Mixing] = field(default_factory=list)
    gaps: list[Gap] = field(default_factory=list)
    touches: list[tuple[NDArray[np.int64], NDArray[np.int64], int]] = field(default_factory=list)
    readers: set[Place] = field(default_factory=set)
    writers: set[Place] = field(default_factory=set)
    node: fx.Node | None = None
    clock: int = 0

    def parameter(self, name: str, shape: Sequence[int]) -> Value:
        """A parameter or float buffer, with fresh ids along each of its dimensions."""
        fields = []
        for dim, size in enumerate(shape):
            if size > 1:
                fields.append(_arange(shape, dim, self.fresh(size, (name, dim))))
        return Value(tuple(shape), tuple(fields), (), frozenset({name}))

    def fresh(self, size: int, owner: Place) -> int:
        """Reserves `size` ids for an owner; returns the first."""
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
        """The ids that an owner, given by its index into `owners`, has."""
        end = self.starts[owner + 1] if owner + 1 < len(self.starts) else self.count
        return np.arange(self.starts[owner], end)

    def owners_of(self, ids: Ids) -> set[Place]:
        """The (tensor, dim) pairs that own the given ids."""
        flat = np.unique(_flat(neurons(ids)))
        return {self.owners[i] for i in np.unique(self.owner_positions(flat[flat > 0]))}

    # --- what rules say -------------------------------------------------------------------------

    def tie(self, a: Ids, b: Ids) -> None:
        """Neurons at the same place of `a` and `b` (broadcast) move together; 0 ties nothing."""
        left, right = torch.broadcast_tensors(a, b)
        x, y = _flat(left), _flat(right)
        real = (x > 0) & (y > 0) & (x != y)
        if real.any():
            x, y = x[real], y[real]
            self.strands.append((x, y))
            self.ties.append((x & _NEURON, y & _NEURON, self.node))

    def block(self, f: Field, dims: Iterable[int]) -> None:
        """All neurons along `dims` become one unit, in order."""
        dims, order, stride = tuple(dims), torch.zeros_like(f.ids), 1
        for dim in dims:
            size = f.ids.shape[dim]
            line = torch.arange(size).reshape([-1 if d == dim else 1 for d in range(f.ids.dim())])
            order, stride = order + line * stride, stride * size
        self.tie(f.first(dims), f.ids)
        self.orders.append((_flat(f.ids), _flat(order)))

    def freeze(
        self, f: Field, kind: Kind, why: str, *, operator: str = "", inside: bool = False
    ) -> None:
        """The neurons of a field stay where they are (the arguments are those of `Freeze`)."""
        inside = inside or kind is Kind.HOST
        ids = np.unique(f.tally[0] & _NEURON)
        self.freezes.append(Freeze(ids, kind, why, self.node, operator, inside))

    def ask(self, tensor: str, kind: Kind, why: str) -> None:
        """All neurons of a parameter stay where they are, because it was asked for."""
        for owner, (name, _) in enumerate(self.owners):
            if name == tensor:
                self.freezes.append(Freeze(self.ids_of(owner), kind, why, None, asked=True))

    def mix(self, why: str, sources: frozenset[str] = frozenset(), ids: Ids | None = None) -> None:
        """Members put side by side no longer give the mean of the members after this operator."""
        flat = None if ids is None else np.unique(_flat(neurons(ids)))
        self.mixings.append(Mixing(why, self.node, sources, flat))

    def touch(self, value: Value, tag: int = 0) -> None:
        """Neurons of `value` pass through the current operator (part of a unit's signature)."""
        self.touches += [(*f.tally, 2 * self.clock + tag) for f in value.fields]

    def role(self, value: Value, f: Field, *, reader: bool) -> None:
        """Notes on which side of its tensor a parameter's field is used."""
        if value.is_parameter:
            (self.readers if reader else self.writers).update(self.owners_of(f.ids))

    # --- what follows ---------------------------------------------------------------------------

    def components(self) -> NDArray[np.int64]:
        """Connected component of each id; settles the ties that depend on blocks."""
        pending = self.deferred
        self.deferred = []
        component = self._connect()
        for small, large, is_parameter, node in pending:
            self.node = node
            if _is_blocked(component, small, large):
                self.freeze(
                    small,
                    Kind.COMMON if is_parameter else Kind.HOST,
                    "one index is shared by several units that each need it in order",
                    inside=True,
                )
            else:
                # What `large` has more of stays in order: two outputs of a depthwise channel, say.
                self.block(large, sorted(set(large.dims) - set(small.dims)))
                self.tie(small.ids, large.ids)
        self.node = None
        return self._connect() if pending else component

    def slots(self, component: NDArray[np.int64]) -> NDArray[np.int64]:
        """Numbers the neurons of one owner in each unit: equal numbers should correspond.

        Neurons correspond when they play the same part in their units: the same owner, the same
        place in every block, the same operators passed, tied in the same way to neurons that
        correspond (colour refinement). Where that tells nothing, their indices decide;
        `structure` says whether the units are alike under this numbering.
        """
        owner = self.owner_positions(np.arange(self.count))
        keys, counts = np.unique(component * len(self.owners) + owner, return_counts=True)
        # Units with one slot in each place have no order to find.
        several = np.zeros(int(component.max(initial=0)) + 1, dtype=bool)
        several[keys[counts > 1] // len(self.owners)] = True
        wanted = several[component]
        colour = self._seen(_scramble(owner.astype(np.uint64)))
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
        slot[chosen[order]] = _counted(place[:, order])
        return slot

    def structure(
        self, component: NDArray[np.int64], slots: NDArray[np.int64]
    ) -> NDArray[np.uint64]:
        """For each unit, a hash of all that was found out about its slots.

        Two units with the same hash are interchangeable slot by slot: every operator treats their
        slots alike, and the slots are tied alike.
        """
        owner = self.owner_positions(np.arange(self.count))
        slot = _scramble((owner << _PART | slots).astype(np.uint64))
        result = np.zeros(int(component.max(initial=0)) + 1, dtype=np.uint64)
        np.add.at(result, component, _scramble(self._seen(slot)))
        everything = np.ones(self.count, dtype=bool)
        for number, strand in enumerate(self.strands):
            x, y, forth, _ = self._labelled(*strand, number, everything)
            # Which end of a strand is which shows in its label.
            np.add.at(result, component[x], _scramble(_scramble(slot[x] ^ forth) + slot[y]))
        return result

    def _seen(self, colour: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """Adds to each neuron's colour what the operators saw of the neuron itself."""
        colour = colour.copy()
        for ids, counts, tag in self.touches:
            seen = counts.astype(np.uint64) * _scramble(_key(2 * tag, ids >> _PART))
            np.add.at(colour, ids & _NEURON, seen)
        for number, (ids, order) in enumerate(self.orders):
            place = _scramble(_key(2 * number + 1, ids >> _PART)) + order.astype(np.uint64)
            np.add.at(colour, ids & _NEURON, _scramble(place))
        return colour

    def _labelled(
        self,
        x: NDArray[np.int64],
        y: NDArray[np.int64],
        number: int,
        wanted: NDArray[np.bool_],
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.uint64], NDArray[np.uint64]]:
        """Both ends of a strand, and its label as seen from either: which tie, which parts."""
        kept = wanted[x & _NEURON]
        x, y = x[kept], y[kept]
        forth = _scramble(_scramble(_key(2 * number, x >> _PART)) + (y >> _PART).astype(np.uint64))
        return x & _NEURON, y & _NEURON, forth, ~forth

    def _connect(self) -> NDArray[np.int64]:
        if not self.ties:
            return np.arange(self.count)
        a = np.concatenate([x for x, _, _ in self.ties])
        b = np.concatenate([y for _, y, _ in self.ties])
        graph = coo_array((np.ones(len(a), dtype=np.int8), (a, b)), shape=(self.count, self.count))
        _, component = connected_components(graph, directed=False)
        return np.asarray(component, dtype=np.int64)


def _scramble(keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A 64-bit hash (splitmix64), so that sums of colours tell multisets apart."""
    with np.errstate(over="ignore"):
        x = keys.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def _counted(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Numbers equal neighbouring columns: 0, 1, 2, ..."""
    starts = np.r_[True, (rows[:, 1:] != rows[:, :-1]).any(axis=0)]
    number = np.arange(rows.shape[1])
    return number - np.maximum.accumulate(np.where(starts, number, 0))


def _key(number: int, part: NDArray[np.int64]) -> NDArray[np.uint64]:
    return (part << _PART | number).astype(np.uint64)


def _ranks(colours: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Colours as small numbers, in the order in which they first appear."""
    _, first, inverse = np.unique(colours, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse].astype(np.int64)


def _flat(ids: Ids) -> NDArray[np.int64]:
    flat: NDArray[np.int64] = ids.reshape(-1).numpy()
    return flat


def _is_blocked(component: NDArray[np.int64], small: Field, large: Field) -> bool:
    """Whether `large` is tied along the dimensions of `small`: then `small` is an order in it.

    A single unit shares the order with nobody.
    """
    grouped = component[neurons(large.ids).numpy()]
    if bool((grouped == grouped.flat[0]).all()):
        return False
    dims = [d for d in small.dims if large.ids.shape[d] > 1]
    return all(bool((grouped == grouped.take([0], axis=d)).all()) for d in dims)
