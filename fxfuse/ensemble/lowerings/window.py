"""Operators that treat every example alike: the members' batches one after the other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from fxfuse.ensemble.forms import Writer, arguments, is_tensor, recall
from fxfuse.ensemble.lowerings.channels import apart, side_by_side
from fxfuse.ensemble.lowerings.registry import lowering

aten = torch.ops.aten

#: Operator → the rank of a batch; one example alone has one dimension less.
_RANKS: Mapping[Any, int] = {
    aten.adaptive_avg_pool1d.default: 3,
    aten.adaptive_avg_pool2d.default: 4,
    aten.adaptive_avg_pool3d.default: 5,
    aten.avg_pool1d.default: 3,
    aten.avg_pool2d.default: 4,
    aten.avg_pool3d.default: 5,
    aten.max_pool1d.default: 3,
    aten.max_pool2d.default: 4,
    aten.max_pool3d.default: 5,
    aten.pixel_shuffle.default: 4,
    aten.upsample_bicubic2d.vec: 4,
    aten.upsample_bilinear2d.vec: 4,
    aten.upsample_nearest2d.vec: 4,
}


#: Those that mix channels.
_ACROSS = (aten.pixel_shuffle.default,)


@lowering(*_RANKS)
def per_example(writer: Writer, node: fx.Node) -> fx.Node | None:
    """`[n, b, *]` as `[n·b, *]`; behind grouped convolutions `[n, b, c, *]` as `[b, n·c, *]`."""
    given = arguments(node)
    (name, x), *rest = given.items()
    if not is_tensor(node) or x.meta["val"].dim() != _RANKS[node.target]:
        return None
    others = fx.map_arg(dict(rest), writer.shared)
    stacked = writer.stacked(x)
    if writer.groups_convolutions and node.target not in _ACROSS:
        # The memory is in this order there.
        together = side_by_side(writer, stacked)
        return apart(writer, recall(writer, node, {name: together, **others}))
    together = writer.call(aten.flatten.using_ints, stacked, 0, 1)
    result = recall(writer, node, {name: together, **others})
    return writer.call(aten.unflatten.int, result, 0, [writer.n, -1])
