"""The units that stand along the dimensions of a labelled tensor, and whether they grow."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from fxfuse.analysis.coupling import CouplingGraph, Index
from fxfuse.analysis.labels import AbstractTensor, DimLabels, neurons
from fxfuse.graph.torch_compat import pytree
from fxfuse.transform.layout import Copies, Layout, run_layout


def values_in(value: Any) -> list[AbstractTensor]:
    """Return the tensors that the value of a node is or holds."""
    leaves = pytree.tree_leaves(value, is_leaf=lambda x: isinstance(x, AbstractTensor))
    return [x for x in leaves if isinstance(x, AbstractTensor)]


class Units:
    """The units of a network, and how many copies of each there are at the new width.

    Attributes:
        component: The unit of each neuron, int64 [neurons].
        free: The units of the groups whose size changes.
        count: How many copies of each unit there are, int64 [units]; 1 where nothing changes.
    """

    def __init__(self, analysis: CouplingGraph, copies: Copies) -> None:
        self.component: Index = analysis.coupling.components()
        # One more than there are units: number -1, no unit, is none that grows.
        self._grows = np.zeros(int(self.component.max(initial=-1)) + 2, dtype=bool)
        self.count: Index = np.ones(len(self._grows), dtype=np.int64)
        self._names: dict[int, str] = {}
        coupling = analysis.coupling
        for owner, (name, dim) in enumerate(coupling.owners):
            for group in analysis.group_of.get((name, dim), ()):
                if group.name in copies:
                    units = self.component[coupling.starts[owner] + group.index[(name, dim)]]
                    self._grows[units] = True
                    self.count[units] = copies[group.name][:, None]
                    self._names.update(dict.fromkeys(units.reshape(-1).tolist(), group.name))
        self.free = frozenset(np.flatnonzero(self._grows).tolist())

    def grow(self, units: Index) -> np.ndarray:
        """Return which of some units grow or shrink: bool of the shape of `units`."""
        found: np.ndarray = self._grows[units]
        return found

    def groups_at(self, values: Iterable[Any]) -> list[str]:
        """The groups that change their size and have neurons in some of the values of nodes."""
        found: set[str] = set()
        for value in values_in(list(values)):
            for f in value.fields:
                units = np.unique(self.free_units(f))
                found.update(self._names[unit] for unit in units.tolist() if unit >= 0)
        return sorted(found)

    def along(self, value: AbstractTensor, dim: int) -> Index | None:
        """The unit of each index along a dimension, int64 [size]; None where it has no labels."""
        return next((self._line(f, dim) for f in value.fields if dim in f.dims), None)

    def _line(self, f: DimLabels, dim: int) -> Index:
        ids = neurons(f.bare)
        for other in f.dims:
            if other != dim:
                ids = ids.amax(other, keepdim=True)
        line: Index = self.component[ids.reshape(-1).numpy()]
        return line

    def order(self, value: AbstractTensor, dim: int) -> bytes | None:
        """Return which units stand along a dimension, if the dimension is one that grows."""
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

    @staticmethod
    def without_place(order: bytes) -> bytes:
        """Return an order without the dimension that it may name after its units (int64)."""
        return order[: len(order) // 8 * 8]

    def _is_one_unit(self, f: DimLabels) -> bool:
        units = np.unique(self.component[neurons(f.bare).numpy()])
        return len(units) == 1 and int(units[0]) in self.free

    def free_units(self, f: DimLabels) -> Index:
        """Return the unit of each place of a field; -1 where it is none that grows."""
        units = self.component[neurons(f.bare).numpy()]
        return np.where(self.grow(units), units, -1)

    def growing(self, f: DimLabels) -> int | None:
        """Return the dimension along which a field grows when it is given a new layout."""
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

    def run_layout(self, f: DimLabels, dim: int) -> Layout | None:
        """Return a new layout of a field: the copies of each run of a unit's neurons in one piece.

        None where neurons of one index have different numbers of copies: that is no tensor.
        """
        rows = np.moveaxis(self.free_units(f), dim, 0).reshape(f.ids.shape[dim], -1)
        units = rows.max(axis=1)
        counts = self.count[rows]
        if bool(((counts != counts.max(axis=1, keepdims=True)) & (rows >= 0)).any()):
            return None
        return run_layout(units, self.count)

    def index_layout(self, value: AbstractTensor, dim: int, indices: Index) -> Layout:
        """A new layout of some indices: copies next to each other, one where nothing grows."""
        units = self.along(value, dim)
        found = units[indices] if units is not None else np.full(len(indices), -1)
        # One piece for each index.
        none = np.empty(0, dtype=np.int64)
        copy = [
            np.arange(self.count[unit]) if grows else np.array([-1])
            for unit, grows in zip(found, self.grow(found), strict=True)
        ]
        return Layout(np.repeat(indices, [len(c) for c in copy]), np.concatenate([none, *copy]))
