"""Normalisation: statistics are a member's own, whatever stands beside it."""

from __future__ import annotations

import torch
from torch import fx

from fxfuse.ensemble.forms import Form, Writer, arguments
from fxfuse.ensemble.lowerings.channels import apart, side_by_side
from fxfuse.ensemble.lowerings.registry import lowering
from fxfuse.ensemble.weights import read_twice

aten = torch.ops.aten


@lowering(aten.layer_norm.default)
def layer_norm(writer: Writer, node: fx.Node) -> fx.Node:
    """Normalised for all members in one call, then scaled by each member's own weights."""
    given = arguments(node)
    x = writer.stacked(given["input"])
    normal = writer.call(
        aten.layer_norm.default, x, given["normalized_shape"], None, None, given["eps"]
    )
    return _affine(writer, node, normal, given["weight"], given["bias"])


@lowering(aten.rms_norm.default)
def rms_norm(writer: Writer, node: fx.Node) -> fx.Node:
    """As `layer_norm`."""
    given = arguments(node)
    x = writer.stacked(given["input"])
    normal = writer.call(aten.rms_norm.default, x, given["normalized_shape"], None, given["eps"])
    return _affine(writer, node, normal, given["weight"], None)


@lowering(aten.batch_norm.default)
def batch_norm(writer: Writer, node: fx.Node) -> fx.Node | None:
    """`[n, b, c, *]` as `[b, n·c, *]`: statistics are per channel, and so per member."""
    given = arguments(node)
    x = given["input"]
    if writer.form(x) is not Form.STACKED or x.meta["val"].dim() < 2:
        return None
    first = writer.members[0]
    twice = read_twice(first)
    weights = [given[name] for name in ("weight", "bias", "running_mean", "running_var")]
    for weight in weights:
        if weight is None:
            continue
        if writer.form(weight) is not Form.WEIGHT:
            return None
        if first.canonical[writer.values[weight].name] in twice:
            # Its statistics are written to, which a view of them in another shape would hide.
            return None
    channels = x.meta["val"].shape[1]
    own = [w if w is None else writer.weight(w, (writer.n * channels,)) for w in weights]
    rest = [given[name] for name in ("training", "momentum", "eps", "cudnn_enabled")]
    side = side_by_side(writer, writer.stacked(x))
    return apart(writer, writer.call(aten.batch_norm.default, side, *own, *rest))


def _affine(
    writer: Writer, node: fx.Node, normal: fx.Node, weight: fx.Node | None, bias: fx.Node | None
) -> fx.Node:
    """`weight · normal + bias` over the last dimensions, each member with its own."""
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
