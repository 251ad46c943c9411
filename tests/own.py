"""Operators of a user's own, as `torch.library.custom_op` makes them."""

from __future__ import annotations

import torch
from torch import nn


@torch.library.custom_op("fxfuse_tests::swish", mutates_args=())
def swish(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(scale * x)


@torch.library.custom_op("fxfuse_tests::tagged", mutates_args=(), tags=torch.Tag.pointwise)
def tagged(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(scale * x)


@torch.library.custom_op("fxfuse_tests::single", mutates_args=(), tags=torch.Tag.pointwise)
def single(x: torch.Tensor) -> torch.Tensor:
    if x.dtype is not torch.float32:
        raise RuntimeError(f"single takes float32, got {x.dtype}")
    return x * torch.sigmoid(x)


@torch.library.custom_op("fxfuse_tests::unit_length", mutates_args=())
def unit_length(x: torch.Tensor) -> torch.Tensor:
    return x / (1 + x.norm(dim=-1, keepdim=True))


@torch.library.custom_op("fxfuse_tests::smooth", mutates_args=())
def smooth(x: torch.Tensor) -> torch.Tensor:
    return x + 0.5 * x.roll(1, -1)


@torch.library.custom_op("fxfuse_tests::weighted", mutates_args=())
def weighted(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return x * weights


@torch.library.custom_op("fxfuse_tests::affine", mutates_args=())
def affine(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return nn.functional.linear(x, weight, bias)


@torch.library.custom_op("fxfuse_tests::halves", mutates_args=())
def halves(x: torch.Tensor) -> list[torch.Tensor]:
    first, second = x.chunk(2, -1)
    return [first.clone(), second.clone()]


def _like(x: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


for _operator in (swish, tagged, single, unit_length, smooth, weighted):
    _operator.register_fake(_like)


@affine.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@halves.register_fake
def _(x: torch.Tensor) -> list[torch.Tensor]:
    shape = (*x.shape[:-1], x.shape[-1] // 2)
    return [x.new_empty(shape), x.new_empty(shape)]
