"""Members' channels side by side: `[b, n·c, *]`, for operators that take channels apart anyway.

Both ways are views where the memory is in that order already, as it is after such an operator.
"""

from __future__ import annotations

import torch
from torch import fx

from fxfuse.ensemble.forms import Writer

aten = torch.ops.aten


def side_by_side(writer: Writer, stacked: fx.Node) -> fx.Node:
    """Return `[n, b, c, *]` as `[b, n·c, *]`."""
    return writer.call(
        aten.flatten.using_ints, writer.call(aten.transpose.int, stacked, 0, 1), 1, 2
    )


def apart(writer: Writer, together: fx.Node) -> fx.Node:
    """Return `[b, n·c, *]` as `[n, b, c, *]`."""
    split = writer.call(aten.unflatten.int, together, 1, [writer.n, -1])
    return writer.call(aten.transpose.int, split, 0, 1)
