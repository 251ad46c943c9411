"""Neuron labels: which neuron sits at which index of a tensor, and which neurons move together.

Notation used in this package: an *id* is the number of a neuron (0: no neuron, padding). A *field*
is a labelling of one tensor: ids that vary along some of its dimensions and not along the others,
stored as an int64 tensor of full rank with size 1 along the others. A tensor can have several
fields (the weight of a linear layer has one per dimension). Dimensions of size 1 carry no field:
there is nothing to permute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import fx

Ids = torch.Tensor


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
    def of(ids: Ids) -> Field | None:
        """Compresses ids: dimensions along which they are constant get size 1."""
        for dim, size in enumerate(ids.shape):
            if size > 1 and (ids.stride(dim) == 0 or _is_constant_along(ids.numpy(), dim)):
                ids = ids.narrow(dim, 0, 1)
        dims = tuple(d for d in range(ids.dim()) if ids.shape[d] > 1)
        return Field(ids.contiguous(), dims) if dims else None


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

        def move(fields: tuple[Field, ...]) -> tuple[Field, ...]:
            moved = (Field.of(operation(f.ids.expand(self.shape))) for f in fields)
            return tuple(f for f in moved if f is not None)

        return replace(
            self,
            shape=shape,
            fields=move(self.fields),
            positions=move(self.positions),
            constant=None,
        )


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
        node: Where.
        operator: The operator whose rule is missing, when that is the reason.
        inside: Whether the reason lies inside the network, so that a rule, or another way to write
            the network, could free the neurons; always so for `Kind.HOST`.
    """

    ids: NDArray[np.int64]
    kind: Kind
    why: str
    node: fx.Node | None
    operator: str = ""
    inside: bool = False


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

    owners: list[tuple[str, int]] = field(default_factory=list)
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
    readers: set[tuple[str, int]] = field(default_factory=set)
    writers: set[tuple[str, int]] = field(default_factory=set)
    node: fx.Node | None = None
    clock: int = 0

    def parameter(self, name: str, shape: Sequence[int]) -> Value:
        """A parameter or float buffer, with fresh ids along each of its dimensions."""
        fields = []
        for dim, size in enumerate(shape):
            if size > 1:
                fields.append(_arange(shape, dim, self.fresh(size, (name, dim))))
        return Value(tuple(shape), tuple(fields), (), frozenset({name}))

    def fresh(self, size: int, owner: tuple[str, int]) -> int:
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

    def owners_of(self, ids: Ids) -> set[tuple[str, int]]:
        """The (tensor, dim) pairs that own the given ids."""
        flat = np.unique(_flat(ids))
        return {self.owners[i] for i in np.unique(self.owner_positions(flat[flat > 0]))}

    # --- what rules say -------------------------------------------------------------------------

    def tie(self, a: Ids, b: Ids, *, same: bool = True) -> None:
        """Neurons at the same place of `a` and `b` (broadcast) move together; 0 ties nothing.

        Args:
            a: Ids.
            b: Ids.
            same: Whether they play the same part in their units, so that `colours` may hand on
                what it knows; False for neurons of which only the units belong together.
        """
        left, right = torch.broadcast_tensors(a, b)
        x, y = _flat(left), _flat(right)
        real = (x > 0) & (y > 0) & (x != y)
        if real.any():
            self.ties.append((x[real], y[real], self.node))
            if same:
                self.strands.append((x[real], y[real]))

    def block(self, f: Field, dims: Iterable[int]) -> None:
        """All neurons along `dims` become one unit, in order."""
        head, order, stride = f.ids, torch.zeros_like(f.ids), 1
        for dim in dims:
            size = f.ids.shape[dim]
            head = head.narrow(dim, 0, 1)
            line = torch.arange(size).reshape([-1 if d == dim else 1 for d in range(f.ids.dim())])
            order, stride = order + line * stride, stride * size
        self.tie(head, f.ids, same=False)
        self.orders.append((_flat(f.ids), _flat(order)))

    def freeze(
        self, f: Field, kind: Kind, why: str, *, operator: str = "", inside: bool = False
    ) -> None:
        """The neurons of a field stay where they are (the arguments are those of `Freeze`)."""
        inside = inside or kind is Kind.HOST
        self.freezes.append(Freeze(f.tally[0], kind, why, self.node, operator, inside))

    def mix(self, why: str, sources: frozenset[str] = frozenset(), ids: Ids | None = None) -> None:
        """Members put side by side no longer give the mean of the members after this operator."""
        flat = None if ids is None else np.unique(_flat(ids))
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

    def colours(self, component: NDArray[np.int64]) -> NDArray[np.uint64]:
        """Which part a neuron plays in its unit: equal for neurons that correspond.

        A neuron's part is its owner, its place in every block, the operators that it passes
        itself, and the parts of the neurons that it is tied to (colour refinement). Found only for
        units with several slots in one place: others have no order.
        """
        owner = self.owner_positions(np.arange(self.count))
        slots, counts = np.unique(np.stack([component, owner]), axis=1, return_counts=True)
        several = np.zeros(int(component.max(initial=0)) + 1, dtype=bool)
        several[slots[0, counts > 1]] = True
        wanted = several[component]
        colour = _scramble(owner.astype(np.uint64))
        for ids, counts, tag in self.touches:
            colour[ids] += counts.astype(np.uint64) * _scramble(np.array([2 * tag], np.uint64))
        for number, (ids, order) in enumerate(self.orders):
            np.add.at(colour, ids, _scramble((2 * number + 1 << 32) + order.astype(np.uint64)))
        pairs = [(x[wanted[x]], y[wanted[x]]) for x, y in self.strands]
        a = np.concatenate([np.empty(0, np.int64), *(x for p in pairs for x in p)])
        b = np.concatenate([np.empty(0, np.int64), *(x for p in pairs for x in p[::-1])])
        known = 0
        while known < (found := len(np.unique(colour[wanted]))):
            known = found
            around = np.zeros_like(colour)
            np.add.at(around, a, _scramble(colour[b]))
            colour = _scramble(colour + _scramble(around))
        return colour

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


def _flat(ids: Ids) -> NDArray[np.int64]:
    flat: NDArray[np.int64] = ids.reshape(-1).numpy()
    return flat


def _is_blocked(component: NDArray[np.int64], small: Field, large: Field) -> bool:
    """Whether `large` is tied along the dimensions of `small`: then `small` is an order in it."""
    grouped = component[large.ids.numpy()]
    dims = [d for d in small.dims if large.ids.shape[d] > 1]
    return all(bool((grouped == grouped.take([0], axis=d)).all()) for d in dims)
