"""Matrix products: one wide product, or one batched product."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxfuse.stack.forms import Form, Writer, arguments
from fxfuse.stack.lowerings.registry import lowering

aten = torch.ops.aten


@lowering(aten.linear.default, starts=True)
def linear(writer: Writer, node: fx.Node) -> fx.Node | None:
    """`[*, i] → [n, *, o]`: of a shared input one wide product, of others one for each member."""
    given = arguments(node)
    x, weight, bias = given["input"], given["weight"], given["bias"]
    if weight.meta["val"].dim() != 2:
        return None
    if writer.form(x) is Form.SHARED:
        return _wide(writer, x, weight, bias)
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
    first, second = given["self"], given.get("other", given.get("mat2"))
    ranks = [n.meta["val"].dim() for n in (first, second)]
    if min(ranks) < 2:
        return None
    if ranks[1] == 2:
        # As one matrix of many rows: broadcasting would copy the second operand.
        return _batched(writer, first, writer.stacked(second), None)
    rank = max(ranks)
    both = [writer.broadcast(n, rank) for n in (first, second)]
    return writer.call(aten.matmul.default, *both)


def _wide(writer: Writer, x: fx.Node, weight: fx.Node, bias: fx.Node | None) -> fx.Node:
    """`[*, i]` by `[n·o, i]`: `[*, n·o]`, taken apart into `[n, *, o]`."""
    outputs, inputs = weight.meta["val"].shape
    wide = [_rows(writer, weight, (writer.n * outputs, inputs))]
    if bias is not None:
        wide.append(_rows(writer, bias, (writer.n * outputs,)))
    product = writer.call(aten.linear.default, writer.shared(x), *wide)
    apart = writer.call(aten.unflatten.int, product, -1, [writer.n, outputs])
    return writer.call(aten.movedim.int, apart, -2, 0)


def _rows(writer: Writer, node: fx.Node, shape: tuple[int, ...]) -> fx.Node:
    """The members' tensors one below the other."""
    if writer.form(node) is Form.WEIGHT:
        return writer.weight(node, shape)
    return writer.call(aten.flatten.using_ints, writer.stacked(node), 0, 1)


def _batched(writer: Writer, x: fx.Node, matrices: fx.Node, bias: fx.Node | None) -> fx.Node:
    """`[n, *, i]` by `[n, i, o]`: `[n, *, o]`."""
    rank, rows = x.meta["val"].dim(), writer.stacked(x)
    if rank == 1:
        rows = writer.call(aten.unsqueeze.default, rows, 1)
    elif rank > 2:
        rows = writer.call(aten.flatten.using_ints, rows, 1, -2)
    product: Any
    if bias is None:
        product = writer.call(aten.bmm.default, rows, matrices)
    else:
        addend = _rows_of_bias(writer, bias)
        product = writer.call(aten.baddbmm.default, addend, rows, matrices)
    if rank == 1:
        return writer.call(aten.squeeze.dim, product, 1)
    if rank > 2:
        return writer.call(aten.unflatten.int, product, 1, writer.sizes(x)[:-1])
    return product


def _rows_of_bias(writer: Writer, bias: fx.Node) -> Any:
    """`[o]` of each member as `[n, 1, o]`."""
    return writer.broadcast(bias, 2)
