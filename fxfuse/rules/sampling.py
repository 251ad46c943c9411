"""Sampling of pixels at places that are computed: channels pass, places are no neurons."""

from __future__ import annotations

from dataclasses import replace

import torch

from fxfuse.labels import Value, positions
from fxfuse.rules.algebra import only_unlabelled
from fxfuse.rules.registry import Call, rule

aten = torch.ops.aten


@rule(aten.grid_sampler.default)
def grid_sampler(call: Call) -> Value:
    """`b c *, b * d -> b c *`: each sample has its own grid."""
    x, grid = call.args[0], call.args[1]
    call.ledger.touch(x)
    x = only_unlabelled(call.ledger, x, range(2, x.rank), "sampled over: neighbours matter")
    only_unlabelled(call.ledger, grid, range(grid.rank), "says where pixels are sampled")
    shape = call.shape
    varying = x.unlabelled | {0, *range(2, len(shape))}
    return replace(x, shape=shape, positions=positions(shape, varying), sources=None, constant=None)
