"""Pooling and interpolation of pixels, and reductions over dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from fxfuse.labels import Value, positions
from fxfuse.rules.algebra import drop, only_unlabelled, reduce_over
from fxfuse.rules.registry import Call, rule

aten = torch.ops.aten

#: Dimensions that a pooling operator works on, counted from the end.
_POOLING: dict[Any, int] = {
    aten.max_pool1d.default: 1,
    aten.max_pool2d.default: 2,
    aten.max_pool3d.default: 3,
    aten.avg_pool1d.default: 1,
    aten.avg_pool2d.default: 2,
    aten.avg_pool3d.default: 3,
    aten.adaptive_avg_pool1d.default: 1,
    aten.adaptive_avg_pool2d.default: 2,
    aten.adaptive_avg_pool3d.default: 3,
}
#: Interpolation, likewise.
_UPSAMPLING: dict[Any, int] = {
    aten.upsample_nearest1d.vec: 1,
    aten.upsample_nearest2d.vec: 2,
    aten.upsample_nearest3d.vec: 3,
    aten.upsample_linear1d.vec: 1,
    aten.upsample_bilinear2d.vec: 2,
    aten.upsample_bicubic2d.vec: 2,
    aten.upsample_trilinear3d.vec: 3,
}
_SPACE = _POOLING | _UPSAMPLING
_AVERAGES = (
    "aten::upsample_",
    "aten::avg_pool",
    "aten::adaptive_avg_pool",
    "aten::mean",
    "aten::sum",
)


@rule(*_SPACE)
def pool(call: Call) -> Value:
    """Channels pass; pixels are pooled or interpolated."""
    x: Value = call.args[0]
    call.ledger.touch(x)
    space = range(x.rank - _SPACE[call.node.target], x.rank)
    x = only_unlabelled(call.ledger, x, space, "pooled over: neighbours matter")
    shape = call.shape
    _note_nonlinear(call, x)
    return replace(
        x, shape=shape, positions=positions(shape, x.unlabelled | set(space)), constant=None
    )


@rule(
    aten.mean.dim,
    aten.mean.default,
    aten.sum.dim_IntList,
    aten.sum.default,
    aten.amax.default,
    aten.amin.default,
    aten.linalg_vector_norm.default,
)
def reduce(call: Call) -> Value:
    """Labels along reduced dimensions are mixed and gone."""
    x: Value = call.args[0]
    call.ledger.touch(x)
    given = call.optional("dim")
    dims = [given] if isinstance(given, int) else given
    over: Sequence[int] = [d % x.rank for d in dims] if dims else range(x.rank)
    reduce_over(call.ledger, x, over, "reduction over the members' neurons")
    _note_nonlinear(call, x)
    return replace(drop(x, over, keepdim=bool(call.optional("keepdim"))), shape=call.shape)


def _note_nonlinear(call: Call, x: Value) -> None:
    if not call.node.target._schema.name.startswith(_AVERAGES):  # type: ignore[union-attr]
        for f in x.fields:
            call.ledger.mix("an averaged activation passes a nonlinear operator", ids=f.ids)
