"""The units that stand along the dimensions of a labelled tensor, and whether they grow."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from fxfuse.coupling import CouplingGraph, Index
from fxfuse.labels import Field, Value, neurons
from fxfuse.layout import Layout


class Units:
    """The units of a network, of which the free ones have a copy for each member.

    Attributes:
        n_members: N.
        component: The unit of each neuron, int64 [neurons].
        free: The units that grow.
    """

    def __init__(self, analysis: CouplingGraph, n_members: int) -> None:
        self.n_members = n_members
        self.component: Index = analysis.ledger.components()
        self.free = self._free_units(analysis)

    def _free_units(self, analysis: CouplingGraph) -> frozenset[int]:
        ledger = analysis.ledger
        free: set[int] = set()
        for owner, (name, dim) in enumerate(ledger.owners):
            for group in analysis.group_of.get((name, dim), ()):
                rows = group.index[(name, dim)].reshape(-1)
                free.update(self.component[ledger.starts[owner] + rows].tolist())
        return frozenset(free)

    def grow(self, units: Index) -> np.ndarray:
        """Which of some units grow: bool of the shape of `units`."""
        return np.isin(units, list(self.free))

    def along(self, value: Value, dim: int) -> Index | None:
        """The unit of each index along a dimension, int64 [size]; None where it has no labels."""
        return next((self._line(f, dim) for f in value.fields if dim in f.dims), None)

    def _line(self, f: Field, dim: int) -> Index:
        ids = neurons(f.ids)
        for other in f.dims:
            if other != dim:
                ids = ids.amax(other, keepdim=True)
        line: Index = self.component[ids.reshape(-1).numpy()]
        return line

    def order(self, value: Value, dim: int) -> bytes | None:
        """Which units stand along a dimension, if the dimension is one that grows."""
        for f in value.fields:
            if dim in f.dims:
                units = self._line(f, dim)
                if len(np.unique(units)) > 1 or f.dims == (dim,):
                    if self.free.isdisjoint(units.tolist()):
                        continue
                    return units.tobytes()
                if self._is_one_unit(f):
                    # No dimension tells units apart, so the label says which one it is.
                    return units.tobytes() + bytes([value.rank - dim])
        return None

    def _is_one_unit(self, f: Field) -> bool:
        units = np.unique(self.component[neurons(f.ids).numpy()])
        return len(units) == 1 and int(units[0]) in self.free

    def free_units(self, f: Field) -> Index:
        """The unit of each place of a field; -1 where it is none that grows."""
        units = self.component[neurons(f.ids).numpy()]
        return np.where(self.grow(units), units, -1)

    def growing(self, f: Field) -> int | None:
        """The dimension along which a field grows when it is given a new layout."""
        units = self.free_units(f)
        if bool((units < 0).all()):
            return None
        rows = {d: np.moveaxis(units, d, 0).reshape(units.shape[d], -1) for d in f.dims}
        # Copies of whole rows: best where a row is free or not as a whole, and tells units apart.
        return max(
            f.dims,
            key=lambda d: (
                bool(((rows[d] < 0) == (rows[d][:, :1] < 0)).all()),
                len(np.unique(rows[d][:, 0])) > 1,
            ),
        )

    def run_layout(self, f: Field, dim: int) -> Layout:
        """A new layout of a field: the copies of each run of a unit's neurons in one piece."""
        units = np.moveaxis(self.free_units(f), dim, 0).reshape(f.ids.shape[dim], -1).max(axis=1)
        runs = np.flatnonzero(np.r_[True, (units[1:] != units[:-1]) | (units[1:] < 0)])
        source, copy = [], []
        for start, end in pairwise([*runs.tolist(), len(units)]):
            members = np.array([-1]) if units[start] < 0 else np.arange(self.n_members)
            source.append(np.tile(np.arange(start, end), len(members)))
            copy.append(np.repeat(members, end - start))
        return Layout(np.concatenate(source), np.concatenate(copy))

    def index_layout(self, value: Value, dim: int, indices: Index) -> Layout:
        """A new layout of some indices: copies next to each other, one where nothing grows."""
        units = self.along(value, dim)
        found = units[indices] if units is not None else np.full(len(indices), -1)
        repeats = np.where(self.grow(found), self.n_members, 1)
        copy = [np.arange(n) if n > 1 else np.array([-1]) for n in repeats]
        none = np.empty(0, dtype=np.int64)
        return Layout(np.repeat(indices, repeats), np.concatenate([none, *copy]))
