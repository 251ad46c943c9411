"""What the stack returns: the members' outputs together, their mean, or their vote.

The mean is that of the outputs, or of the probabilities that they are logits of.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from fxfuse.ensemble.forms import Form, Writer, is_tensor
from fxfuse.errors import RewriteError
from fxfuse.graph.source_lines import where_of
from fxfuse.graph.torch_compat import copy_signature

aten = torch.ops.aten

#: Writes the reduction of one output, [N, *shape].
Reduction = Callable[[Writer, fx.Node, int], fx.Node]


def write_output(writer: Writer, reduce: str, class_dim: int) -> fx.Node:
    """Write the output node: as a member's, every tensor reduced."""
    source = writer.members[0].graph
    (output,) = (node for node in source.nodes if node.op == "output")

    def reduced(node: fx.Node) -> Any:
        if not is_tensor(node):
            if writer.form(node) is Form.SHARED:
                return writer.shared(node)
            raise _error(node, "is a number that depends on data", "return it as a tensor")
        if reduce != "none":
            _check(node, reduce, class_dim)
        return REDUCTIONS[reduce](writer, writer.stacked(node), class_dim)

    copy_signature(source, writer.graph)
    written: fx.Node = writer.graph.output(fx.map_arg(output.args[0], reduced))
    return written


def _vote(writer: Writer, outputs: fx.Node, class_dim: int) -> fx.Node:
    """Return, of the classes with most votes, the one with the largest mean output."""
    dim = class_dim if class_dim < 0 else class_dim + 1
    largest = writer.call(aten.amax.default, outputs, [dim], True)
    votes = writer.call(aten.sum.dim_IntList, writer.call(aten.eq.Tensor, outputs, largest), [0])
    mean = writer.call(aten.mean.dim, outputs, [0])
    most = writer.call(aten.amax.default, votes, [class_dim], True)
    beaten = writer.call(aten.lt.Tensor, votes, most)
    left = writer.call(aten.masked_fill.Scalar, mean, beaten, -float("inf"))
    return writer.call(aten.argmax.default, left, class_dim)


def _probabilities(writer: Writer, outputs: fx.Node, class_dim: int) -> fx.Node:
    """Return the mean of the probabilities of logits."""
    dim = class_dim if class_dim < 0 else class_dim + 1
    return writer.call(aten.mean.dim, writer.call(aten.softmax.int, outputs, dim), [0])


#: By name.
REDUCTIONS: Mapping[str, Reduction] = {
    "mean": lambda writer, outputs, class_dim: writer.call(aten.mean.dim, outputs, [0]),
    "probabilities": _probabilities,
    "none": lambda writer, outputs, class_dim: outputs,
    "vote": _vote,
}


def _check(node: fx.Node, reduce: str, class_dim: int) -> None:
    tensor = node.meta["val"]
    if not tensor.is_floating_point() and not (reduce == "mean" and tensor.is_complex()):
        raise _error(node, f"of {tensor.dtype} cannot be reduced by {reduce}", "use reduce='none'")
    if reduce in ("vote", "probabilities") and not -tensor.dim() <= class_dim < tensor.dim():
        shape = tuple(tensor.shape)
        raise _error(node, f"{shape} has no dimension {class_dim}", "pass another class_dim=")


def _error(node: fx.Node, why: str, how: str) -> RewriteError:
    return RewriteError(
        "the members' outputs cannot be reduced",
        where=where_of(node),
        why=f"an output {why}",
        how=how,
    )
