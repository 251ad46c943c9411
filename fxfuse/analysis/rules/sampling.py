"""Sampling of pixels at places that are computed: channels pass, places are no neurons.

Torchvision's operators are registered by name, since it need not be installed.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import replace
from typing import Any

import torch

from fxfuse.analysis.labels import AbstractTensor, positions
from fxfuse.analysis.rules.algebra import only_unlabelled
from fxfuse.analysis.rules.registry import Call, concrete_shape, rule

aten = torch.ops.aten


@rule(aten.grid_sampler.default)
def grid_sampler(call: Call) -> AbstractTensor:
    """`b c *, b * d -> b c *`: each sample has its own grid."""
    x, grid = call.args[:2]
    call.coupling.record_use(x)
    x = only_unlabelled(call.coupling, x, range(2, x.rank), "sampled over: neighbours matter")
    grid = only_unlabelled(call.coupling, grid, range(grid.rank), "says where pixels are sampled")
    return _sampled(x, grid, call.shape, {0, *range(2, x.rank)})


@rule(aten.affine_grid_generator.default)
def affine_grid(call: Call) -> AbstractTensor:
    """`b d e -> b * d`: coordinates are in order."""
    theta: AbstractTensor = call.args[0]
    call.coupling.record_use(theta)
    only_unlabelled(call.coupling, theta, range(theta.rank), "says where pixels are sampled")
    shape = call.shape
    return AbstractTensor(
        shape, positions=positions(shape, range(len(shape))), sources=theta.sources
    )


@rule("torchvision::roi_align", "torchvision::roi_pool")
def roi(call: Call) -> Any:
    """`b c *, k box -> k c *`: channels pass, every box is a sample of its own."""
    x, boxes = call.args[:2]
    call.coupling.record_use(x)
    x = only_unlabelled(call.coupling, x, (0, 2, 3), "sampled at boxes: neighbours matter")
    boxes = only_unlabelled(call.coupling, boxes, (0, 1), "the coordinates of a box are in order")
    for f in x.fields:
        call.coupling.mix("an averaged activation is sampled at boxes", ids=f)
    produced = call.node.meta["val"]
    # roi_pool also returns where each maximum was found, channel by channel.
    if isinstance(produced, list | tuple):
        return [_sampled(x, boxes, concrete_shape(fake), {0, 2, 3}) for fake in produced]
    return _sampled(x, boxes, call.shape, {0, 2, 3})


def _sampled(
    x: AbstractTensor, places: AbstractTensor, shape: tuple[int, ...], varying: Set[int]
) -> AbstractTensor:
    sources = None if x.sources is None or places.sources is None else x.sources | places.sources
    content = positions(shape, x.unlabelled | varying)
    return replace(x, shape=shape, positions=content, sources=sources, constant=None)
