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

    @cached_property
    def tally(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The ids that are neurons, and how often each is in the field; int64 [n] both."""
        ids = flat_ids(self.ids)
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
    def of(ids: Ids, where: Callable[[], torch.Tensor] | None = None) -> DimLabels | None:
        """Compress ids: dimensions along which the neurons are the same get size 1.

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
        return DimLabels(_with_parts(found.ids, told), found.dims)

    def first(self, dims: Iterable[int]) -> Ids:
        """Return one id for each block along `dims`: the first, which plays the same part in each.

        The first that is a neuron, that is: padding (id 0) stands for none.
        """
        ids = self.ids
        for dim in dims:
            ids = ids.gather(dim, (ids > 0).byte().argmax(dim, keepdim=True))
        return ids


def neurons(ids: Ids) -> Ids:
    """Return the neurons of ids, without their parts."""
    return ids & NEURON


def flat_ids(ids: Ids) -> NDArray[np.int64]:
    """Return the ids in one line, int64 [n], not copied."""
    flat: NDArray[np.int64] = ids.reshape(-1).numpy()
    return flat


def counted(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Number equal neighbouring columns: 0, 1, 2, ..."""
    starts = np.r_[True, (rows[:, 1:] != rows[:, :-1]).any(axis=0)]
    number = np.arange(rows.shape[1])
    return number - np.maximum.accumulate(np.where(starts, number, 0))


def _compressed(ids: Ids, told: Ids) -> DimLabels | None:
    for dim, size in enumerate(ids.shape):
        if size > 1 and _is_constant_along(told.numpy(), dim):
            ids, told = ids.narrow(dim, 0, 1), told.narrow(dim, 0, 1)
    dims = tuple(d for d in range(ids.dim()) if ids.shape[d] > 1)
    return DimLabels(ids.contiguous(), dims) if dims else None


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


def _is_constant_along(ids: NDArray[np.int64], dim: int) -> bool:
    line = np.moveaxis(ids, dim, 0)
    # Where ids vary, they nearly always vary at once: the whole is compared only when it has to be.
    return all(bool((line[i] == line[0]).all()) for i in (1, -1)) and bool((line == line[0]).all())


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
        shape: tuple[int, ...] = tuple(operation(torch.empty(()).expand(self.shape)).shape)

        def move(f: DimLabels, tell: bool) -> DimLabels | None:
            def where() -> torch.Tensor:
                # Along dimensions that the field does not have, the same neuron stands everywhere.
                sizes = [1 if d in f.dims else size for d, size in enumerate(self.shape)]
                return operation(torch.arange(prod(sizes)).reshape(sizes).expand(self.shape))

            return DimLabels.of(operation(f.ids.expand(self.shape)), where if tell else None)

        fields = [move(f, True) for f in self.fields]
        places = [move(f, False) for f in self.positions]
        for before, after in zip(self.fields, fields, strict=True):
            if int(before.ids.max()) > NEURON and after is not None:
                # Where only the part varies there is no label, but the content differs.
                part = DimLabels.of(operation(before.ids.expand(self.shape)) >> PART)
                places += positions(shape, set(part.dims if part else ()) - set(after.dims))
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
