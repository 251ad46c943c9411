"""Convolutions: wide where the members share the input, grouped where each has its own."""

from __future__ import annotations

from typing import Any

from torch import fx

from fxfuse.ensemble.forms import Form, Writer, arguments, recall
from fxfuse.ensemble.lowerings.channels import apart, side_by_side
from fxfuse.ensemble.lowerings.registry import lowering
from fxfuse.graph.operator_facts import Convolution, operators


@lowering(*operators(Convolution, transposed=False))
def convolution(writer: Writer, node: fx.Node) -> fx.Node | None:
    """`[b, i, *]` or `[b, n·i, *]` by `[n·o, i, *]`: `[b, n·o, *]`, taken apart."""
    given = arguments(node)
    x, weight, bias = given["input"], given["weight"], given["bias"]
    shape = weight.meta["val"].shape
    if any(writer.form(w) is not Form.WEIGHT for w in (weight, bias) if w is not None):
        return None
    if x.meta["val"].dim() != len(shape):
        return None
    wide: dict[str, Any] = {}
    if writer.form(x) is Form.SHARED:
        patches = list(given["stride"]) == list(shape[2:])
        if given["groups"] != 1 or not (patches or writer.groups_convolutions):
            return None
        wide["input"] = writer.shared(x)
    elif writer.form(x) is Form.STACKED and writer.groups_convolutions:
        wide["input"] = side_by_side(writer, writer.stacked(x))
        wide["groups"] = writer.n * given["groups"]
    else:
        return None
    wide["weight"] = writer.weight(weight, (writer.n * shape[0], *shape[1:]))
    wide["bias"] = None if bias is None else writer.weight(bias, (writer.n * shape[0],))
    return apart(writer, recall(writer, node, {**given, **wide}))
