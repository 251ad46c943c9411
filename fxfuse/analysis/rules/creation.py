"""Tensors made from sizes alone (sizes known at capture are folded before a rule is asked)."""

from __future__ import annotations

from dataclasses import replace

import torch

from fxfuse.analysis.labels import AbstractTensor, positions, sources_of
from fxfuse.analysis.rules.algebra import align
from fxfuse.analysis.rules.registry import Call, rule

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
def filled(call: Call) -> AbstractTensor:
    """One value everywhere: nothing varies."""
    return AbstractTensor(call.shape, sources=frozenset())


@rule(aten.arange.default, aten.arange.start, aten.arange.start_step)
def arange(call: Call) -> AbstractTensor:
    """A count: varies along its dimension, without labels."""
    return AbstractTensor(call.shape, positions=positions(call.shape, [0]), sources=frozenset())


@rule(aten.zero_.default, aten.fill_.Scalar)
def overwrite(call: Call) -> AbstractTensor:
    """Whatever was there is gone; no neuron is there now."""
    value: AbstractTensor = call.args[0]
    return AbstractTensor(value.shape, sources=value.sources)


@rule(aten.fill_.Tensor)
def overwrite_with(call: Call) -> AbstractTensor:
    """As `overwrite`; the value comes from a tensor without dimensions."""
    call.coupling.record_use(call.args[1], 1)
    return AbstractTensor(call.args[0].shape, sources=sources_of(call.values()))


@rule(aten.copy_.default)
def copy(call: Call) -> AbstractTensor:
    """The content of another tensor, broadcast."""
    target, source = call.args[0], align(call.args[1], call.args[0].rank)
    call.coupling.record_use(source)
    return replace(source, shape=target.shape)
