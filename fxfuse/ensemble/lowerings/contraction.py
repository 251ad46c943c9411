"""Matrix products: one product for all members, batched over them."""

from __future__ import annotations

import torch
from torch import fx

from fxfuse.ensemble.forms import Writer, arguments
from fxfuse.ensemble.lowerings.registry import lowering
from fxfuse.graph.operator_facts import FACTS, Contraction

aten = torch.ops.aten


@lowering(aten.linear.default, aten.addmm.default, starts=True)
def linear(writer: Writer, node: fx.Node) -> fx.Node | None:
    """`[*, i] → [n, *, o]`."""
    facts, given = FACTS[node.target], arguments(node)
    assert isinstance(facts, Contraction)
    x, weight, bias = (given[name] for name in (facts.input, facts.weight, facts.bias))
    ranks = [n.meta["val"].dim() for n in (weight, bias) if n is not None]
    if ranks not in ([2], [2, 1]) or any(given[name] != 1 for name in facts.factors):
        return None
    matrices = writer.stacked(weight)
    if not facts.transposed:
        matrices = writer.call(aten.transpose.int, matrices, 1, 2)  # [n, i, o]
    return _batched(writer, x, matrices, bias)


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
    """Return `[n, *, i]` by `[n, i, o]`: `[n, *, o]`."""
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
