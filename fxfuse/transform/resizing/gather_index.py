"""Data movement between layouts as one gather, where no literals describe it.

The movement runs on positions; the result says for each element of the wide result where in the
flat wide operand it stands.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from fxfuse.transform.layout import Layout

#: A data movement operator with its literals at the members' width.
Move = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Movement:
    """One data movement.

    Attributes:
        move: The operator at the members' width.
        shape: Shape of its operand at the members' width.
        have: Layouts of the grown dimensions of the operand.
        want: Layouts of the grown dimensions of the result.
        twin: For each dimension in `have`, the dimension in `want` along which the copies of the
            same neurons stand.
    """

    move: Move
    shape: tuple[int, ...]
    have: Mapping[int, Layout]
    want: Mapping[int, Layout]
    twin: Mapping[int, int]

    def kept(self, source: int, target: int) -> bool:
        """Whether dimension `source` of the operand simply is dimension `target` of the result."""
        found = self.move(_line(self.shape, source))
        if found.shape[target] != self.shape[source]:
            return False
        rest = (self.move(_line(self.shape, d)) for d in range(len(self.shape)) if d != source)
        return torch.equal(found, _line(found.shape, target)) and all(
            bool((r == r.narrow(target, 0, 1)).all()) for r in rest
        )

    def index(self, skip: int | None) -> tuple[torch.Tensor, int]:
        """Return where each element of the wide result is in the flat operand.

        Args:
            skip: A dimension of the operand that is left out (the batch).

        Returns:
            int64 of the wide result's shape, -1 where the operand lacks a copy; and the number of
            elements of the flat operand.
        """
        index, stride = torch.zeros([], dtype=torch.int64), 1
        missing = torch.zeros([], dtype=torch.bool)
        for dim in reversed(range(len(self.shape))):
            if dim == skip:
                continue
            at = self.move(_line(self.shape, dim))
            for d, layout in self.want.items():
                at = at.index_select(d, torch.from_numpy(layout.source))
            have = self.have.get(dim)
            if have is not None:
                at = torch.from_numpy(self.table(dim, have))[at, self.copies(dim, at) + 1]
                missing = missing | (at < 0)
            index = index + at * stride
            stride *= self.shape[dim] if have is None else have.size
        return torch.where(missing, -1, index), stride

    def table(self, dim: int, have: Layout) -> np.ndarray:
        """Return where each copy (first column: shared by all members) of each index stands."""
        copies = max(int(layout.copy.max(initial=0)) for layout in (have, *self.want.values()))
        table = np.full((self.shape[dim], copies + 2), -1)
        table[have.source, have.copy + 1] = np.arange(have.size)
        return np.where(table < 0, table[:, :1], table)

    def copies(self, dim: int, like: torch.Tensor) -> torch.Tensor:
        """Return which copy of the operand's neurons each element of the wide result holds."""
        twin = self.twin.get(dim)
        if twin is None:
            return torch.full_like(like, -1)
        line = torch.from_numpy(self.want[twin].copy)
        return line.reshape([-1 if d == twin else 1 for d in range(like.dim())]).expand_as(like)


def _line(shape: tuple[int, ...] | torch.Size, dim: int) -> torch.Tensor:
    line = torch.arange(shape[dim])
    return line.reshape([-1 if d == dim else 1 for d in range(len(shape))]).expand(shape)
