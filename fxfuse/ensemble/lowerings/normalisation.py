"""Normalisation: statistics are a member's own, whatever is beside it."""

from __future__ import annotations

import torch
from torch import fx

from fxfuse.ensemble.forms import Form, Writer, arguments, recall
from fxfuse.ensemble.lowerings.channels import apart, side_by_side
from fxfuse.ensemble.lowerings.registry import lowering
from fxfuse.ensemble.weights import read_twice
from fxfuse.graph.operator_facts import Normalisation, batch_norm_of, operators

aten = torch.ops.aten


@lowering(*operators(Normalisation, over="last"))
def layer_norm(writer: Writer, node: fx.Node) -> fx.Node:
    """Normalised for all members in one call, then scaled by each member's own weights."""
    given = arguments(node)
    plain = {"input": writer.stacked(given["input"]), "weight": None, "bias": None}
    normal = recall(writer, node, given | plain)
    return _affine(writer, node, normal, given["weight"], given.get("bias"))


@lowering(*operators(Normalisation, over="batch"))
def batch_norm(writer: Writer, node: fx.Node) -> fx.Node | None:
    """`[n, b, c, *]` as `[b, n·c, *]`: statistics are per channel, and so per member."""
    given, facts = arguments(node), batch_norm_of(node)
    assert facts is not None
    x = given[facts.input]
    if writer.form(x) is not Form.STACKED or x.meta["val"].dim() < 2:
        return None
    first = writer.members[0]
    twice = read_twice(first)
    weights = {name: given[name] for name in facts.state if given[name] is not None}
    for weight in weights.values():
        if writer.form(weight) is not Form.WEIGHT:
            return None
        if first.canonical[writer.values[weight].name] in twice:
            # Its statistics are written to, which a view of them in another shape would hide.
            return None
    shape = (writer.n * x.meta["val"].shape[1],)
    wide = {name: writer.weight(weight, shape) for name, weight in weights.items()}
    wide[facts.input] = side_by_side(writer, writer.stacked(x))
    return apart(writer, recall(writer, node, given | wide))


def _affine(
    writer: Writer, node: fx.Node, normal: fx.Node, weight: fx.Node | None, bias: fx.Node | None
) -> fx.Node:
    """Return `weight · normal + bias` over the last dimensions, each member with its own."""
    rank = node.meta["val"].dim()
    scale = None if weight is None else writer.broadcast(weight, rank)
    shift = None if bias is None else writer.broadcast(bias, rank)
    if scale is None and shift is None:
        return normal
    if scale is None:
        return writer.call(aten.add.Tensor, normal, shift)
    if shift is None:
        return writer.call(aten.mul.Tensor, normal, scale)
    return writer.call(aten.addcmul.default, shift, normal, scale)
