"""Convolutions of an input that all members share: computed once, all output channels at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxfuse.stack.forms import Form, Writer, arguments, recall
from fxfuse.stack.lowerings.registry import lowering

aten = torch.ops.aten


@lowering(
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv1d.padding,
    aten.conv2d.padding,
    aten.conv3d.padding,
)
def convolution(writer: Writer, node: fx.Node) -> fx.Node | None:
    """`[b, i, *]` by `[n·o, i, *]`: `[b, n·o, *]`, taken apart into `[n, b, o, *]`."""
    given = arguments(node)
    x, weight, bias = given["input"], given["weight"], given["bias"]
    if writer.form(x) is not Form.SHARED or given["groups"] != 1:
        return None
    if writer.form(weight) is not Form.WEIGHT or (bias and writer.form(bias) is not Form.WEIGHT):
        return None
    shape = weight.meta["val"].shape
    if x.meta["val"].dim() != len(shape):
        return None
    if not writer.policy.pays_wide(shape[2:], given["stride"]):
        return None
    outputs = shape[0]
    wide: dict[str, Any] = {"input": writer.shared(x)}
    wide["weight"] = writer.weight(weight, (writer.n * outputs, *shape[1:]))
    wide["bias"] = writer.weight(bias, (writer.n * outputs,)) if bias else None
    together = recall(writer, node, {**given, **wide})
    apart = writer.call(aten.unflatten.int, together, 1, [writer.n, outputs])
    return writer.call(aten.transpose.int, apart, 0, 1)
