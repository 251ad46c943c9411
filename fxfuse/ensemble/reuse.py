"""Memory that nobody needs any more is written over, as in-place layers do.

Capture makes values of the writes of in-place layers (docs/adr/0011-no-writes-in-place.md). Where
members run apart, each would pay for that in eager mode; this takes it back where it is safe.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from fxfuse.graph.operator_facts import Convolution, Normalisation, operators

aten = torch.ops.aten

#: Operators that allocate their result and do not need it for their gradient.
_FRESH = (
    aten.add.Tensor,
    aten.add_.Tensor,
    *operators(Normalisation, over="batch"),
    *operators(Convolution),
)
#: Operators that can write over their operand and do not need it for their gradient.
_IN_PLACE: Mapping[Any, Any] = {
    aten.add.Tensor: aten.add_.Tensor,
    aten.hardtanh.default: aten.hardtanh_.default,
    aten.relu.default: aten.relu_.default,
}


def reuse_memory(graph: fx.Graph) -> None:
    """Let operators write over an operand that was made for them alone."""
    for node in graph.nodes:
        if node.target not in _IN_PLACE:
            continue
        if node.target is aten.add.Tensor and not node.kwargs and not _is_free(node.args[0], node):
            # A sum is the same the other way round.
            node.args = (node.args[1], node.args[0])
        if _is_free(node.args[0], node):
            node.target = _IN_PLACE[node.target]


def _is_free(operand: Any, node: fx.Node) -> bool:
    """Tell whether an operand has the place for a node's result, and no other reader."""
    if not isinstance(operand, fx.Node) or operand.target not in _FRESH:
        return False
    before, after = operand.meta.get("val"), node.meta.get("val")
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return False
    alone = list(operand.users) == [node] and list(node.args).count(operand) == 1
    return alone and before.dtype == after.dtype and str(before.shape) == str(after.shape)
