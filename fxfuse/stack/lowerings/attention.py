"""Attention: the members' batches one after the other."""

from __future__ import annotations

import torch
from torch import fx

from fxfuse.stack.forms import Form, Writer, arguments, recall
from fxfuse.stack.lowerings.registry import lowering

aten = torch.ops.aten


@lowering(aten.scaled_dot_product_attention.default)
def attention(writer: Writer, node: fx.Node) -> fx.Node | None:
    """`[n, b, h, t, d]` as `[n·b, h, t, d]`; a mask must be the same for all examples."""
    given = arguments(node)
    names = ("query", "key", "value")
    if given["dropout_p"] or any(given[name].meta["val"].dim() != 4 for name in names):
        return None
    mask = given["attn_mask"]
    if mask is not None:
        shape = mask.meta["val"].shape
        if writer.form(mask) is not Form.SHARED or (len(shape) > 3 and shape[0] != 1):
            return None
        given["attn_mask"] = writer.shared(mask)
    if len({str(given[name].meta["val"].shape[0]) for name in names}) > 1:
        # Batches that broadcast against each other would no longer line up.
        return None
    for name in names:
        stacked = writer.stacked(given[name])
        given[name] = writer.call(aten.flatten.using_ints, stacked, 0, 1)
    together = recall(writer, node, given)
    return writer.call(aten.unflatten.int, together, 0, [writer.n, -1])
