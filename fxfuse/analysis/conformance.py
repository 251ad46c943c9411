"""Whether what a rule returned can be the labels of what the operator returns."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxfuse.analysis.labels import AbstractTensor, DimLabels, Repeating, neurons
from fxfuse.analysis.rules import concrete_shape, rule_file
from fxfuse.errors import RuleError
from fxfuse.graph.source_lines import where_of


def check_result(node: fx.Node, result: Any, count: int) -> None:
    """Check the value that a rule returned for a node against the operator's own, `meta["val"]`."""
    produced = node.meta["val"]
    if not isinstance(produced, list | tuple):
        _check_one(node, produced, result, count, "")
        return
    if not isinstance(result, list | tuple):
        what = f"the operator returns {len(produced)} results, the rule a {type(result).__name__}"
        raise _error(node, what)
    if len(result) != len(produced):
        raise _error(node, f"the operator returns {len(produced)} results, the rule {len(result)}")
    for place, (fake, value) in enumerate(zip(produced, result, strict=True)):
        _check_one(node, fake, value, count, f"result {place}: ")


def _check_one(node: fx.Node, fake: Any, value: Any, count: int, which: str) -> None:
    if not isinstance(fake, torch.Tensor):
        return
    if not isinstance(value, AbstractTensor):
        raise _error(
            node, f"{which}the rule returns a {type(value).__name__}, not an AbstractTensor"
        )
    shape = concrete_shape(fake)
    if tuple(value.shape) != shape:
        raise _error(node, f"{which}the rule returns shape {value.shape}, the operator {shape}")
    if value.constant is not None and tuple(value.constant.shape) != shape:
        constant = tuple(value.constant.shape)
        raise _error(node, f"{which}a constant has shape {constant}, the operator's result {shape}")
    for f in (*value.fields, *value.positions):
        fault = _fault(f, shape)
        if fault:
            raise _error(node, f"{which}{fault}")
    for f in value.fields:
        numbers = neurons(f.table if isinstance(f, Repeating) else f.ids)
        if numbers.numel() and not 0 <= int(numbers.min()) <= int(numbers.max()) < count:
            raise _error(node, f"{which}a field holds ids that no neuron has")


def _fault(f: Any, shape: tuple[int, ...]) -> str:
    """Return what is wrong with a field of a tensor of this shape; empty when nothing is."""
    if not isinstance(f, DimLabels):
        return f"a {type(f).__name__} is not a DimLabels"
    sizes = f.shape
    if not isinstance(f, Repeating) and f.ids.dtype != torch.int64:
        return f"the ids of a field are {f.ids.dtype}, not torch.int64"
    if len(sizes) != len(shape):
        return f"the ids of a field have {len(sizes)} dimensions, the tensor {len(shape)}"
    if any(size not in (1, full) for size, full in zip(sizes, shape, strict=True)):
        return f"the ids of a field have shape {sizes}, which does not broadcast to {shape}"
    varying = tuple(d for d, size in enumerate(sizes) if size != 1)
    if tuple(f.dims) != varying:
        return f"a field says that its ids vary along {f.dims}; they vary along {varying}"
    return ""


def _error(node: fx.Node, why: str) -> RuleError:
    return RuleError(
        f"the rule of {node.target} contradicts the operator",
        where=where_of(node),
        why=why,
        how=f"fix the rule in {rule_file(node.target)}",
    )
