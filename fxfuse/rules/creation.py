"""Tensors made from sizes alone (sizes known at capture are folded before a rule is asked)."""

from __future__ import annotations

import torch

from fxfuse.labels import Value, positions
from fxfuse.rules.registry import Call, rule

aten = torch.ops.aten


@rule(
    aten.zeros.default,
    aten.ones.default,
    aten.full.default,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
)
def filled(call: Call) -> Value:
    """One value everywhere: nothing varies."""
    return Value(call.shape, sources=frozenset())


@rule(aten.arange.default, aten.arange.start, aten.arange.start_step)
def arange(call: Call) -> Value:
    """A count: varies along its dimension, without labels."""
    return Value(call.shape, positions=positions(call.shape, [0]), sources=frozenset())
