"""Attention: the members' batches one after the other."""

from __future__ import annotations

import torch
from torch import fx

from fxfuse.ensemble.forms import Form, Writer, arguments, recall
from fxfuse.ensemble.lowerings.registry import lowering

aten = torch.ops.aten


@lowering(aten.scaled_dot_product_attention.default)
def attention(writer: Writer, node: fx.Node) -> fx.Node | None:
    """`[n, b, h, t, d]` as `[n·b, h, t, d]`; a mask must be the same for all members."""
    given = arguments(node)
    names = ("query", "key", "value")
    if given["dropout_p"] or any(given[name].meta["val"].dim() != 4 for name in names):
        return None
    mask = given["attn_mask"]
    if mask is not None and writer.form(mask) is not Form.SHARED:
        return None
    if len({str(given[name].meta["val"].shape[0]) for name in names}) > 1:
        # Batches that broadcast against each other would no longer line up.
        return None
    for name in names:
        stacked = writer.stacked(given[name])
        given[name] = writer.call(aten.flatten.using_ints, stacked, 0, 1)
    if mask is not None:
        given["attn_mask"] = _mask(writer, mask)
    together = recall(writer, node, given)
    return writer.call(aten.unflatten.int, together, 0, [writer.n, -1])


def _mask(writer: Writer, mask: fx.Node) -> fx.Node:
    """A mask of the members' examples, one after the other, where examples have their own."""
    shape = mask.meta["val"].shape
    if len(shape) < 4 or str(shape[0]) == "1":
        shared: fx.Node = writer.shared(mask)
        return shared
    return writer.call(aten.flatten.using_ints, writer.stacked(mask), 0, 1)
