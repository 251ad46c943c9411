"""Matrix products: one product for all members, batched over them."""

from __future__ import annotations

import torch
from torch import fx

from fxfuse.ensemble.forms import Writer, arguments
from fxfuse.ensemble.lowerings.registry import lowering

aten = torch.ops.aten


@lowering(aten.linear.default, starts=True)
def linear(writer: Writer, node: fx.Node) -> fx.Node | None:
    """`[*, i] → [n, *, o]`."""
    given = arguments(node)
    x, weight, bias = given["input"], given["weight"], given["bias"]
    if weight.meta["val"].dim() != 2:
        return None
    matrices = writer.call(aten.transpose.int, writer.stacked(weight), 1, 2)  # [n, i, o]
    return _batched(writer, x, matrices, bias)


@lowering(aten.addmm.default, starts=True)
def addmm(writer: Writer, node: fx.Node) -> fx.Node | None:
    """`bias + x · w`, `[b, i]` and `[i, o]`."""
    given = arguments(node)
    bias, x, weight = given["self"], given["mat1"], given["mat2"]
    if given["beta"] != 1 or given["alpha"] != 1 or bias.meta["val"].dim() != 1:
        return None
    return _batched(writer, x, writer.stacked(weight), bias)


@lowering(aten.matmul.default, aten.mm.default, aten.bmm.default)
def matmul(writer: Writer, node: fx.Node) -> fx.Node | None:
    """Leading dimensions broadcast, those of the members too."""
    given = arguments(node)
    first, second = given.values()
    ranks = [n.meta["val"].dim() for n in (first, second)]
    if min(ranks) < 2:
        return None
    if ranks[1] == 2:
        # As one matrix of many rows: broadcasting would copy the second operand.
        return _batched(writer, first, writer.stacked(second), None)
    rank = max(ranks)
    both = [writer.broadcast(n, rank) for n in (first, second)]
    return writer.call(aten.matmul.default, *both)


def _batched(writer: Writer, x: fx.Node, matrices: fx.Node, bias: fx.Node | None) -> fx.Node:
    """`[n, *, i]` by `[n, i, o]`: `[n, *, o]`."""
    rank, rows = x.meta["val"].dim(), writer.stacked(x)
    if rank == 1:
        rows = writer.call(aten.unsqueeze.default, rows, 1)
    elif rank > 2:
        rows = writer.call(aten.flatten.using_ints, rows, 1, -2)
    # Not baddbmm: of a single row, torch.compile makes one kernel of product, bias and whatever
    # follows, but leaves baddbmm to the library.
    product = writer.call(aten.bmm.default, rows, matrices)
    if bias is not None:
        product = writer.call(aten.add_.Tensor, product, writer.broadcast(bias, 2))  # [n, 1, o]
    if rank == 1:
        return writer.call(aten.squeeze.dim, product, 1)
    if rank > 2:
        return writer.call(aten.unflatten.int, product, 1, writer.sizes(x)[:-1])
    return product
