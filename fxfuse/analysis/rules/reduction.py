"""Pooling and interpolation of pixels, and reductions over dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from fxfuse.analysis.labels import AbstractTensor, positions
from fxfuse.analysis.rules.algebra import align, drop, meet, only_unlabelled, reduce_over
from fxfuse.analysis.rules.registry import Call, concrete_shape, rule
from fxfuse.graph.torch_compat import schema_of

aten = torch.ops.aten

#: Dimensions that a pooling operator works on, counted from the end.
_POOLING: dict[Any, int] = {
    aten.max_pool1d.default: 1,
    aten.max_pool2d.default: 2,
    aten.max_pool3d.default: 3,
    aten.avg_pool1d.default: 1,
    aten.avg_pool2d.default: 2,
    aten.avg_pool3d.default: 3,
    aten.adaptive_avg_pool1d.default: 1,
    aten.adaptive_avg_pool2d.default: 2,
    aten.adaptive_avg_pool3d.default: 3,
}
#: Interpolation, likewise.
_UPSAMPLING: dict[Any, int] = {
    aten.upsample_nearest1d.vec: 1,
    aten.upsample_nearest2d.vec: 2,
    aten.upsample_nearest3d.vec: 3,
    aten._upsample_nearest_exact1d.vec: 1,
    aten._upsample_nearest_exact2d.vec: 2,
    aten._upsample_nearest_exact3d.vec: 3,
    aten.upsample_linear1d.vec: 1,
    aten.upsample_bilinear2d.vec: 2,
    aten._upsample_bilinear2d_aa.vec: 2,
    aten.upsample_bicubic2d.vec: 2,
    aten._upsample_bicubic2d_aa.vec: 2,
    aten.upsample_trilinear3d.vec: 3,
}
_SPACE = _POOLING | _UPSAMPLING
#: Pooling that also tells which pixel was taken.
_INDEXED: dict[Any, int] = {
    aten.max_pool1d_with_indices.default: 1,
    aten.max_pool2d_with_indices.default: 2,
    aten.max_pool3d_with_indices.default: 3,
    aten.adaptive_max_pool1d.default: 1,
    aten.adaptive_max_pool2d.default: 2,
    aten.adaptive_max_pool3d.default: 3,
    aten.fractional_max_pool2d.default: 2,
    aten.fractional_max_pool3d.default: 3,
}
_UNPOOLING: dict[Any, int] = {
    aten.max_unpool2d.default: 2,
    aten.max_unpool3d.default: 3,
}
_AVERAGES = (
    "aten::upsample_",
    "aten::_upsample_",
    "aten::avg_pool",
    "aten::adaptive_avg_pool",
    "aten::mean",
    "aten::sum",
)


@rule(*_SPACE)
def pool(call: Call) -> AbstractTensor:
    """Channels pass; pixels are pooled or interpolated."""
    call.coupling.record_use(call.args[0])
    return _pooled(call, call.args[0], _SPACE[call.node.target], call.shape)


def _pooled(call: Call, x: AbstractTensor, space: int, shape: tuple[int, ...]) -> AbstractTensor:
    """Return labels of x without those along its last `space` dimensions, which get a new size."""
    pixels = range(x.rank - space, x.rank)
    x = only_unlabelled(call.coupling, x, pixels, "pooled over: neighbours matter")
    _note_nonlinear(call, x)
    return replace(
        x, shape=shape, positions=positions(shape, x.unlabelled | set(pixels)), constant=None
    )


@rule(*_INDEXED)
def pool_with_indices(call: Call) -> list[AbstractTensor]:
    """As `pool`; the numbers of the pixels that were taken belong to the same channels."""
    x, space = call.args[0], _INDEXED[call.node.target]
    call.coupling.record_use(x)
    samples = call.optional("random_samples")
    if samples is not None:
        # [b, c, s]: where a channel's windows begin along each of the s dimensions.
        samples = only_unlabelled(call.coupling, samples, [2], "dimensions are in order")
        x = meet(call.coupling, x, _per_channel(samples, x.rank))
    shapes = [concrete_shape(fake) for fake in call.node.meta["val"]]
    return [_pooled(call, x, space, shape) for shape in shapes]


def _per_channel(samples: AbstractTensor, rank: int) -> AbstractTensor:
    first = samples.moved(lambda t: t[..., 0])
    return first.moved(lambda t: t.reshape(t.shape + (1,) * (rank - t.dim())))


@rule(*_UNPOOLING)
def unpool(call: Call) -> AbstractTensor:
    """Values go back to the pixels that their indices name."""
    x, indices = call.args[0], call.args[1]
    call.coupling.record_use(x, 0)
    call.coupling.record_use(indices, 1)
    met = meet(call.coupling, x, indices)
    return _pooled(call, met, _UNPOOLING[call.node.target], call.shape)


@rule(aten.im2col.default)
def unfold(call: Call) -> AbstractTensor:
    """`b c y x -> b (c k) p`: the patches p, each with k pixels of every channel."""
    x: AbstractTensor = call.args[0]
    call.coupling.record_use(x)
    pixels = (x.rank - 2, x.rank - 1)
    x = only_unlabelled(call.coupling, x, pixels, "cut into patches: neighbours matter")
    shape = call.shape
    patch = shape[-2] // x.shape[-3]
    channels = replace(x, positions=()).moved(
        lambda t: t[..., :1, 0].expand(*t.shape[:-2], patch).flatten(-2).unsqueeze(-1)
    )
    varying = {d for d in x.unlabelled if d < x.rank - 3}
    return replace(
        channels,
        shape=shape,
        positions=positions(shape, varying | {len(shape) - 2, len(shape) - 1}),
    )


@rule(aten.col2im.default)
def fold(call: Call) -> AbstractTensor:
    """`b (c k) p -> b c y x`: a channel is k neurons in order."""
    x: AbstractTensor = call.args[0]
    call.coupling.record_use(x)
    x = only_unlabelled(call.coupling, x, [x.rank - 1], "patches overlap: neighbours matter")
    shape = call.shape
    split = x.moved(lambda t: t[..., 0].unflatten(-1, (shape[-3], -1)))
    kernel = split.rank - 1
    for f in split.fields:
        if kernel in f.dims:
            call.coupling.block(f, [kernel])
    channels = drop(split, [kernel], keepdim=False).moved(lambda t: t[..., None, None])
    varying = {d for d in x.unlabelled if d < x.rank - 2}
    pixels = {len(shape) - 2, len(shape) - 1}
    return replace(channels, shape=shape, positions=positions(shape, varying | pixels))


@rule(aten.cosine_similarity.default, aten.pairwise_distance.default)
def compare(call: Call) -> AbstractTensor:
    """Two tensors are compared along one dimension, which is mixed and gone."""
    coupling, operands = call.coupling, call.args[:2]
    rank = max(v.rank for v in operands)
    for place, value in enumerate(operands):
        coupling.record_use(value, place)
        for f in value.fields:
            coupling.role(value, f, reader=False)
    met = meet(coupling, *(align(v, rank) for v in operands))
    given = call.optional("dim")
    dim = (-1 if given is None else given) % rank
    reduce_over(coupling, met, [dim], "compared over the members' neurons")
    for f in met.fields:
        coupling.mix("an averaged activation passes a nonlinear operator", ids=f)
    return replace(drop(met, [dim], keepdim=bool(call.optional("keepdim"))), shape=call.shape)


@rule(
    aten.mean.dim,
    aten.mean.default,
    aten.sum.dim_IntList,
    aten.sum.default,
    aten.amax.default,
    aten.amin.default,
    aten.var.default,
    aten.var.dim,
    aten.var.correction,
    aten.std.default,
    aten.std.dim,
    aten.std.correction,
    aten.norm.Scalar,
    aten.norm.ScalarOpt_dim,
    aten.logsumexp.default,
    aten.prod.default,
    aten.prod.dim_int,
    aten.max.default,
    aten.min.default,
    aten.any.default,
    aten.any.dim,
    aten.all.default,
    aten.all.dim,
    aten.linalg_vector_norm.default,
)
def reduce(call: Call) -> AbstractTensor:
    """Labels along reduced dimensions are mixed and gone."""
    return _reduced(call, call.shape)


@rule(
    aten.var_mean.default,
    aten.var_mean.dim,
    aten.var_mean.correction,
    aten.std_mean.default,
    aten.std_mean.dim,
    aten.std_mean.correction,
    aten.aminmax.default,
)
def reduce_to_two(call: Call) -> list[AbstractTensor]:
    """Two reductions at once."""
    return [_reduced(call, concrete_shape(fake)) for fake in call.node.meta["val"]]


def _reduced(call: Call, shape: tuple[int, ...]) -> AbstractTensor:
    x: AbstractTensor = call.args[0]
    call.coupling.record_use(x)
    given = call.optional("dim")
    dims = [given] if isinstance(given, int) else given
    over: Sequence[int] = [d % x.rank for d in dims] if dims else range(x.rank)
    reduce_over(call.coupling, x, over, "reduction over the members' neurons")
    _note_nonlinear(call, x)
    return replace(drop(x, over, keepdim=bool(call.optional("keepdim"))), shape=shape)


@rule(
    aten.max.dim,
    aten.min.dim,
    aten.median.dim,
    aten.nanmedian.dim,
    aten.kthvalue.default,
    aten.mode.default,
    aten.argmax.default,
    aten.argmin.default,
)
def choose(call: Call) -> Any:
    """A number of what is chosen is a place in an order, so that has to stay if it is read."""
    x: AbstractTensor = call.args[0]
    call.coupling.record_use(x)
    dim = call.argument("dim")
    over = range(x.rank) if dim is None else [dim % x.rank]
    if isinstance(call.node.meta["val"], torch.Tensor) or call.is_read(1):
        x = only_unlabelled(call.coupling, x, over, "chosen by its index")
    else:
        reduce_over(call.coupling, x, over, "reduction over the members' neurons")
    _note_nonlinear(call, x)
    result = drop(x, over, keepdim=bool(call.argument("keepdim")))
    fakes = call.node.meta["val"]
    if isinstance(fakes, torch.Tensor):
        return replace(result, shape=call.shape)
    return [replace(result, shape=concrete_shape(fake)) for fake in fakes]


def _note_nonlinear(call: Call, x: AbstractTensor) -> None:
    if not schema_of(call.node.target).name.startswith(_AVERAGES):
        for f in x.fields:
            call.coupling.mix("an averaged activation passes a nonlinear operator", ids=f)
