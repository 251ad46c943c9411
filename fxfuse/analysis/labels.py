"""Neuron labels: which neuron sits at which index of a tensor.

Notation used in this package: an *id* is the number of a neuron (0: no neuron, padding). A *field*
is a labelling of one tensor: ids that vary along some of its dimensions and not along the others,
stored as an int64 tensor of full rank with size 1 along the others. A tensor can have several
fields (the weight of a linear layer has one per dimension). Dimensions of size 1 carry no field:
there is nothing to permute.

One neuron can stand at several places of a field: a channel that was flattened with its pixels, a
layer's output that is used twice. Then each place has a *part* of its own, in the high bits of the
id (`neurons` strips it), so that parameters that meet different places can be told apart. Parts
are numbered alike for all neurons.

A field of more than `LARGE` places in which few neurons stand again and again (the relative
positions of all pairs of pixels) is kept without the repetitions, as `Repeating`. The operators run
on all of its places all the same, one field at a time; only what is kept is smaller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray

Ids = torch.Tensor
#: A dimension of a named tensor.
Place = tuple[str, int]
#: Indices along a dimension, or numbers of components: int64.
Index = NDArray[np.int64]

#: Where the part begins in an id, and the bits below it.
PART = 32
NEURON = (1 << PART) - 1
#: Expanded to a shape, it tells what an operator makes of that shape, in the least memory.
NOTHING = torch.empty((), dtype=torch.int8)
#: Places of a row that are compared first with those of other rows.
_HASHED = 256
#: A field with more places than this is kept without its repetitions.
LARGE = 1 << 17


class Kind(StrEnum):
    """What a frozen dimension means for fusion (docs/adr/0002-freeze-by-default.md)."""

    #: The index has one meaning for all members: input channels, kernel positions, tokens.
    SHARED_INDEX = "shared"
    #: The network's output: the members' mean is taken.
    OUTPUT = "output"
    #: A dimension inside the network in which members' neurons do not correspond: one member, the
    #: base member, keeps the whole connected piece.
    KEEP_BASE = "base"


# Equal as objects only: tensors have no truth value.
@dataclass(frozen=True, eq=False)
class DimLabels:
    """Ids of the neurons along some dimensions of a tensor.

    Attributes:
        ids: int64, full rank, size 1 along dimensions that the ids do not vary along.
        dims: The dimensions along which the ids vary.
    """

    ids: Ids
    dims: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the ids."""
        return tuple(self.ids.shape)

    @property
    def bare(self) -> Ids:
        """The neurons at all places, with their parts where these cost nothing."""
        return self.ids

    @cached_property
    def held(self) -> NDArray[np.int64]:
        """The neurons of the field, each once and in order; int64 [n]."""
        found = distinct(flat_ids(neurons(self.bare)))
        return found[found > 0]

    @cached_property
    def tally(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The ids that are neurons, and how often each is in the field; int64 [n] both."""
        found, counts = _counted_ids(flat_ids(self.ids))
        real = found > 0
        return found[real], counts[real]

    @staticmethod
    def of(ids: Ids, where: Callable[[], torch.Tensor] | None = None) -> DimLabels | None:
        """Compress ids: dimensions along which the neurons are the same get size 1.

        Args:
            ids: Ids of full rank.
            where: Gives int64 of the same shape that tells places of one neuron apart; asked only
                when a neuron stands at several places.
        """
        # Where nothing but the part varies, the places of a single neuron are all that is left.
        found = _compressed(ids, neurons) or _compressed(ids, lambda same: same)
        if found is None or where is None:
            return found
        if found.ids.numel() <= LARGE:
            return DimLabels(_told(found.ids, where), found.dims)
        small = Repeating.compress(found.ids, found.dims, lambda bare: _told(bare, where))
        if small is None:
            # Parts that are all different have no repetitions, the neurons may have.
            ids = found.ids
            small = Repeating.compress(neurons(ids), found.dims, lambda _: _told(ids, where))
        return small or DimLabels(_told(found.ids, where), found.dims)

    def spread(self, places: Sequence[int], rank: int) -> DimLabels:
        """Return the field with dimension d at `places[d]` of so many, the others of size 1."""
        order = sorted(range(len(places)), key=places.__getitem__)
        sizes = dict(zip(places, self.ids.shape, strict=True))
        ids = self.ids.permute(order).reshape([sizes.get(d, 1) for d in range(rank)])
        return DimLabels(ids, tuple(sorted(places[d] for d in self.dims)))

    def first(self, dims: Iterable[int]) -> Ids:
        """Return one id for each block along `dims`: the first, which plays the same part in each.

        The first that is a neuron, that is: padding (id 0) stands for none.
        """
        ids = self.ids
        for dim in dims:
            ids = ids.gather(dim, (ids > 0).byte().argmax(dim, keepdim=True))
        return ids


class Repeating(DimLabels):
    """A field of many places in which few neurons stand again and again.

    Along each dimension, indices that hold the same neurons share a row of a small table. The
    parts are worked out only when somebody asks for them: neurons that stay where they are need
    none (`settled`).
    """

    def __init__(
        self,
        table: Ids,
        rows: tuple[torch.Tensor, ...],
        dims: tuple[int, ...],
        tell: Callable[[Ids], Ids] | None,
    ) -> None:
        """Keep a table.

        Args:
            table: The ids without repetitions.
            rows: For each dimension, which row of the table each index has; int64.
            dims: The dimensions along which the ids vary.
            tell: Gives the ids with their parts from those of the table at all places; None where
                the parts only have to be different.
        """
        for name, value in (("table", table), ("rows", rows), ("dims", dims), ("tell", tell)):
            object.__setattr__(self, name, value)

    table: Ids
    rows: tuple[torch.Tensor, ...]
    tell: Callable[[Ids], Ids] | None

    @staticmethod
    def compress(
        ids: Ids, dims: tuple[int, ...], tell: Callable[[Ids], Ids] | None
    ) -> Repeating | None:
        """Return the field without repetitions, or None if it would be hardly smaller."""
        table, rows = ids, list[torch.Tensor]()
        for dim in range(ids.dim()):
            first, row = _same_rows(table, dim)
            table = table.index_select(dim, first)
            rows.append(row)
        if 4 * table.numel() > ids.numel():
            return None
        found = Repeating(table, tuple(rows), dims, tell)
        return found if torch.equal(found.bare, ids) else None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the ids."""
        return tuple(len(row) for row in self.rows)

    @property
    def bare(self) -> Ids:
        """The ids of the table at all places, without the parts that tell these apart."""
        found = self.table
        for dim, row in enumerate(self.rows):
            found = found.index_select(dim, row)
        return found

    @cached_property
    def held(self) -> NDArray[np.int64]:
        """The neurons of the field, each once and in order; int64 [n]."""
        found = distinct(flat_ids(neurons(self.table)))
        return found[found > 0]

    @property
    def ids(self) -> Ids:
        """The ids at all places, made anew where their parts only have to be different."""
        return self.by_place() if self.tell is None else self._told

    @cached_property
    def _told(self) -> Ids:
        assert self.tell is not None
        return self.tell(self.bare)

    def by_place(self) -> Ids:
        """Return ids of which each place has a part of its own."""
        ids = neurons(self.bare)
        part = torch.arange(ids.numel()).reshape(ids.shape) << PART
        return torch.where(ids > 0, ids | part, 0)

    def spread(self, places: Sequence[int], rank: int) -> DimLabels:
        """Return the field with dimension d at `places[d]` of so many, the others of size 1."""
        if self.tell is not None:
            return super().spread(places, rank)
        table = DimLabels(self.table, self.dims).spread(places, rank)
        rows = dict(zip(places, self.rows, strict=True))
        one = torch.zeros(1, dtype=torch.int64)
        spread = tuple(rows.get(d, one) for d in range(rank))
        return Repeating(table.ids, spread, table.dims, None)

    def beside(self, other: Repeating) -> tuple[Ids, Ids]:
        """Return the neurons of two fields of one shape side by side, each pair of rows once."""
        left, right = neurons(self.table), neurons(other.table)
        for dim, (row, its) in enumerate(zip(self.rows, other.rows, strict=True)):
            _, first = np.unique((row * (int(its.max()) + 1) + its).numpy(), return_index=True)
            left = left.index_select(dim, row[first])
            right = right.index_select(dim, its[first])
        return left, right

    def settled(self) -> Repeating:
        """Return the same field for neurons that stay: their parts only have to be different."""
        return self if self.tell is None else Repeating(self.table, self.rows, self.dims, None)


def neurons(ids: Ids) -> Ids:
    """Return the neurons of ids, without their parts."""
    return ids & NEURON


def parts(ids: Ids) -> Ids:
    """Return the parts of ids, without their neurons."""
    return ids >> PART


def flat_ids(ids: Ids) -> NDArray[np.int64]:
    """Return the ids in one line, int64 [n], not copied."""
    flat: NDArray[np.int64] = ids.reshape(-1).numpy()
    return flat


def distinct(ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return each number once and in order, of numbers that need not be negative or far apart."""
    return _counted_ids(ids)[0]


def _counted_ids(ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return each number once and in order, and how often it appears."""
    if not len(ids):
        return ids, ids
    first = int(ids.min())
    if int(ids.max()) - first > 4 * len(ids):
        found, counts = np.unique(ids, return_counts=True)
        return found, counts
    line = np.bincount(ids - first)
    found = np.flatnonzero(line)
    return found + first, line[found]


def counted(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Number equal neighbouring columns: 0, 1, 2, ..."""
    starts = np.r_[True, (rows[:, 1:] != rows[:, :-1]).any(axis=0)]
    number = np.arange(rows.shape[1])
    return number - np.maximum.accumulate(np.where(starts, number, 0))


def _compressed(ids: Ids, tell: Callable[[Ids], Ids]) -> DimLabels | None:
    """Narrow dimensions along which what `tell` sees of the ids is the same."""
    for dim, size in enumerate(ids.shape):
        if size > 1 and (ids.stride(dim) == 0 or _is_constant_along(ids, dim, tell)):
            ids = ids.narrow(dim, 0, 1)
    dims = tuple(d for d in range(ids.dim()) if ids.shape[d] > 1)
    return DimLabels(ids.contiguous(), dims) if dims else None


def without_repetitions(
    ids: Ids, exact: Callable[[], DimLabels | None], *, settled: bool = False
) -> DimLabels | None:
    """Compress ids that lack parts, without their repetitions where they are many.

    Args:
        ids: Ids of full rank.
        exact: Gives the compressed ids with their parts.
        settled: Whether the parts only have to be different.
    """
    found = _compressed(ids, neurons)
    if found is None or found.ids.numel() <= LARGE:
        return exact()

    def tell(_: Ids) -> Ids:
        after = exact()
        assert after is not None, "neurons that vary are labels"
        return after.ids

    return Repeating.compress(found.ids, found.dims, None if settled else tell) or exact()


def _same_rows(ids: Ids, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the first index of each kind along a dimension, and the kind of each index.

    By a hash of some of the places: the caller compares.
    """
    lines = ids.movedim(dim, 0).flatten(1) if ids.dim() > 1 else ids[:, None]
    generator = torch.Generator().manual_seed(0)
    if lines.shape[1] > _HASHED:
        chosen = torch.randint(lines.shape[1], (_HASHED,), generator=generator)
        lines = lines.index_select(1, chosen)
    factors = torch.randint(-(1 << 62), 1 << 62, lines.shape[1:], generator=generator)
    hashes = (lines * factors).sum(1).numpy()
    _, first, kind = np.unique(hashes, return_index=True, return_inverse=True)
    return torch.from_numpy(first), torch.from_numpy(kind.reshape(-1))


def _told(ids: Ids, where: Callable[[], torch.Tensor]) -> Ids:
    """Return the ids with parts that tell the places of one neuron apart."""
    if _all_different(ids):
        return ids
    told = where()
    for dim, size in enumerate(ids.shape):
        if size == 1:
            told = told.narrow(dim, 0, 1)
    return _with_parts(ids, told)


def _all_different(ids: Ids) -> bool:
    real = ids[ids > 0]
    return len(torch.unique(real)) == len(real)


def _with_parts(ids: Ids, where: torch.Tensor) -> Ids:
    """Give places of one neuron different parts: by its part so far, by where, by order."""
    flat = flat_ids(ids)
    part = flat >> PART
    keys = np.stack([part, flat_ids(where.expand(ids.shape))])
    part = np.unique(keys, axis=1, return_inverse=True)[1].reshape(-1)
    told = np.stack([flat & NEURON, part])
    order = np.lexsort(told)
    again = np.empty_like(flat)
    again[order] = counted(told[:, order])
    part = np.unique(np.stack([part, again]), axis=1, return_inverse=True)[1].reshape(-1)
    found = np.where(flat > 0, (flat & NEURON) | (part.astype(np.int64) << PART), 0)
    return torch.from_numpy(found).reshape(ids.shape)


def _is_constant_along(ids: Ids, dim: int, tell: Callable[[Ids], Ids]) -> bool:
    """Tell whether what `tell` sees of the ids is the same along a dimension."""
    first, last = tell(ids.select(dim, 0)), ids.shape[dim] - 1
    # Where ids vary, they nearly always vary at once: the whole is compared only when it has to be.
    some = all(torch.equal(tell(ids.select(dim, i)), first) for i in {1, last})
    return some and (last < 3 or bool((tell(ids) == first.unsqueeze(dim)).all()))


@dataclass(frozen=True, eq=False)
class AbstractTensor:
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
    fields: tuple[DimLabels, ...] = ()
    positions: tuple[DimLabels, ...] = ()
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

    def moved(self, operation: Callable[[torch.Tensor], torch.Tensor]) -> AbstractTensor:
        """Apply a data-movement operator to every field, by running it on the ids.

        Args:
            operation: Takes a tensor of `shape` and returns one tensor.
        """
        shape: tuple[int, ...] = tuple(operation(NOTHING.expand(self.shape)).shape)

        def move(ids: Ids) -> Ids:
            return operation(ids.expand(self.shape))

        def move_field(f: DimLabels) -> tuple[DimLabels | None, set[int]]:
            def where() -> torch.Tensor:
                # Along dimensions that the field does not have, the same neuron stands everywhere.
                sizes = [1 if d in f.dims else size for d, size in enumerate(self.shape)]
                return move(torch.arange(prod(sizes)).reshape(sizes))

            ids = move(f.bare)
            if isinstance(f, Repeating):
                after = without_repetitions(
                    ids, lambda: DimLabels.of(move(f.ids), where), settled=f.tell is None
                )
            else:
                after = DimLabels.of(ids, where)
            rest = [d for d in range(ids.dim()) if ids.shape[d] > 1 and ids.stride(d)]
            rest = [d for d in rest if after is not None and d not in after.dims]
            if not rest or not (isinstance(f, Repeating) or int(f.ids.max()) > NEURON):
                return after, set()
            # All places of a field are different: which parts make them so plays no part here.
            told = move(f.by_place()) if isinstance(f, Repeating) else ids
            return after, {d for d in rest if not _is_constant_along(told, d, parts)}

        moved = [move_field(f) for f in self.fields]
        fields = [after for after, _ in moved]
        places = [DimLabels.of(move(f.ids)) for f in self.positions]
        for _, varying in moved:
            # Where only the part varies there is no label, but the content differs.
            places += positions(shape, varying)
        return replace(
            self,
            shape=shape,
            fields=tuple(f for f in fields if f is not None),
            positions=tuple(f for f in places if f is not None),
            constant=None,
        )


def sources_of(values: Iterable[AbstractTensor]) -> frozenset[str] | None:
    """Names of the parameters that values are computed from; None if one depends on inputs."""
    found = [value.sources for value in values]
    return None if None in found else frozenset[str]().union(*(s or () for s in found))


def positions(shape: Sequence[int], dims: Iterable[int]) -> tuple[DimLabels, ...]:
    """Return unlabelled variation along each of `dims`."""
    return tuple(numbered(shape, d, 1) for d in sorted(dims) if shape[d] > 1)


def numbered(shape: Sequence[int], dim: int, start: int) -> DimLabels:
    """Return a field of ids start, start + 1, ... along one dimension."""
    view = [1] * len(shape)
    view[dim] = shape[dim]
    return DimLabels(torch.arange(start, start + shape[dim]).view(view), (dim,))
