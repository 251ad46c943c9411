"""Tables: the rows of all members that shared indices name."""

from __future__ import annotations

import torch
from torch import fx

from fxfuse.ensemble.forms import Form, Writer, arguments
from fxfuse.ensemble.lowerings.registry import lowering

aten = torch.ops.aten


@lowering(aten.embedding.default)
def embedding(writer: Writer, node: fx.Node) -> fx.Node | None:
    """`[n, v, d]` at `[*]`: `[n, *, d]`. A row that gets no gradient keeps a member's operator."""
    given = arguments(node)
    table, indices = given["weight"], given["indices"]
    if writer.form(indices) is not Form.SHARED:
        return None
    if given["padding_idx"] >= 0 or given["scale_grad_by_freq"] or given["sparse"]:
        return None
    return writer.call(aten.index.Tensor, writer.stacked(table), [None, writer.shared(indices)])
