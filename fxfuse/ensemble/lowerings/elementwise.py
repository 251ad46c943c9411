"""Operators that treat every element alike: stacked operands broadcast."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxfuse.ensemble.forms import Form, Writer, is_tensor
from fxfuse.ensemble.lowerings.registry import Entry, lowering

aten = torch.ops.aten


@lowering(
    aten.abs.default,
    aten.alias.default,
    aten.arctan2.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.dropout.default,
    aten.floor_divide.Scalar,
    aten.floor_divide.default,
    aten.greater.Scalar,
    aten.greater.Tensor,
    aten.hardswish.default,
    aten.hardtanh.default,
    aten.less.Scalar,
    aten.less.Tensor,
    aten.lift_fresh_copy.default,
    aten.log_sigmoid.default,
    aten.masked_fill.Scalar,
    aten.masked_fill.Tensor,
    aten.relu6.default,
    aten.rsub.Tensor,
    aten.selu.default,
    aten.softplus.default,
    aten.to.device,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.where.Scalar,
    aten.where.ScalarOther,
    aten.where.ScalarSelf,
)
def elementwise(writer: Writer, node: fx.Node) -> fx.Node | None:
    """The operator itself, its operands aligned so that they broadcast as a member's do."""
    if not is_tensor(node):
        return None
    if torch.Tag.nondeterministic_seeded in node.target.tags and (  # type: ignore[union-attr]
        node.target is not aten.dropout.default
    ):
        return None
    tensors = [n for n in node.all_input_nodes if is_tensor(n)]
    if all(writer.form(n) is Form.SHARED for n in tensors):
        # It draws random numbers, which are a member's own.
        return None
    scalars = [n for n in tensors if n.meta["val"].dim() == 0 and writer.form(n) is not Form.SHARED]
    if scalars and len({n.meta["val"].dtype for n in tensors}) > 1:
        # A tensor without dimensions does not decide the dtype of a result; stacked it would.
        return None
    rank = node.meta["val"].dim()

    def operand(n: fx.Node) -> Any:
        return writer.broadcast(n, rank) if is_tensor(n) else writer.shared(n)

    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), operand)
    return writer.call(node.target, *args, **kwargs)


#: For every operator that torch itself says is pointwise.
POINTWISE = Entry(elementwise, starts=False)
