"""One sample for every operator that has a rule: what stands between two layers.

A sample gets the activation [2, 8, 6, 6] of a convolution whose 8 output channels are neurons, and
returns anything that flattens to [2, *]. `FROZEN` lists the samples whose point is that the
channels must not be moved.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from tests.models import torchvision

aten = torch.ops.aten


class Call(nn.Module):
    """A function of an activation, with layers and parameters of its own."""

    def __init__(self, function: Callable[..., torch.Tensor], *parts: Any) -> None:
        super().__init__()
        self.function = function
        self.layers = nn.ModuleList(p for p in parts if isinstance(p, nn.Module))
        self.tensors = nn.ParameterList(p for p in parts if isinstance(p, torch.Tensor))

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        return self.function(t, *self.layers, *self.tensors)


def _tokens(t: torch.Tensor) -> torch.Tensor:
    return t.flatten(2).transpose(1, 2)  # [b, t, c]


def _heads(t: torch.Tensor, linear: nn.Linear) -> torch.Tensor:
    return linear(_tokens(t)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)  # [3, b, h, t, d]


def _attend(t: torch.Tensor, linear: nn.Linear) -> torch.Tensor:
    return F.scaled_dot_product_attention(*_heads(t, linear)).transpose(1, 2).flatten(2)


def _scores(t: torch.Tensor, linear: nn.Linear, product: Any) -> torch.Tensor:
    q, k, v = _heads(t, linear)
    weights = product(q, k.transpose(-1, -2)).softmax(-1)
    return product(weights, v).transpose(1, 2).flatten(2)


def _bmm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    flat = torch.bmm(a.flatten(0, 1), b.flatten(0, 1))
    return flat.unflatten(0, (-1, a.shape[1]))


def _inner(size: int = 8) -> nn.Linear:
    return nn.Linear(size, 24)


def _pool1d(function: Any) -> Call:
    return Call(lambda t: _indexed(function(t.flatten(2), 2)))


def _pool3d(function: Any) -> Call:
    return Call(lambda t: _indexed(function(t.unsqueeze(2).repeat(1, 1, 4, 1, 1), 2)))


def _indexed(pooled: Any) -> torch.Tensor:
    """The values, and the indices of the pixels that were taken, if told."""
    return pooled[0] + 0.01 * pooled[1] if isinstance(pooled, tuple) else pooled


def _windows(t: torch.Tensor, space: int) -> torch.Tensor:
    """Where the windows of fractional pooling begin: [b, c, space], the same for all channels."""
    start = torch.tensor([0.2, 0.6, 0.4], dtype=t.dtype)[:space]
    return start.expand(t.shape[0], t.shape[1], space)


def _fractional3d(t: torch.Tensor) -> torch.Tensor:
    return aten.fractional_max_pool3d(t, [2, 2, 2], [2, 3, 3], _windows(t, 3))[0]


def _matrix() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(5, 8), torch.randn(8)


def _numbers(t: torch.Tensor) -> torch.Tensor:
    """Numbers from 0 to 8: [b, y, x]."""
    return t.gt(0).sum(1)


def _with_last_states(t: torch.Tensor, layer: nn.GRU) -> torch.Tensor:
    output, states = layer(_tokens(t))
    return torch.cat([output.flatten(1), states.transpose(0, 1).flatten(1)], 1)


def _unroll(t: torch.Tensor, cell: Any, states: int) -> torch.Tensor:
    """Three steps of a cell; the last of its states."""
    zero = t.new_zeros(t.shape[0], 6)
    state: Any = (zero, zero) if states == 2 else zero
    for step in _tokens(t)[:, :3].unbind(1):
        state = cell(step, state)
    return state[1] if states == 2 else state


def _fill(make: Callable[[torch.Tensor], torch.Tensor]) -> Call:
    return Call(lambda t: t + make(t))


def _half(t: torch.Tensor) -> torch.Tensor:
    return torch.tensor(0.5, dtype=t.dtype)


def _zeroed(t: torch.Tensor) -> torch.Tensor:
    t = t.clone()
    t[:, :3].zero_()
    return t


def _filled(t: torch.Tensor) -> torch.Tensor:
    t = t.clone()
    t[:, :, 1:3].fill_(0.5)
    return t


def _filled_with(t: torch.Tensor) -> torch.Tensor:
    t = t.clone()
    t[:, :, 1:3].fill_(t[0, :, 0, 0].amax())
    return t


def _rows(t: torch.Tensor, count: int = 4) -> torch.Tensor:
    """Numbers of rows, which the data decide: [count]."""
    return t.mean((0, 1, 3)).argsort()[:count]


def _picked(t: torch.Tensor) -> torch.Tensor:
    """For each column of each channel of each image, a row: [b, c, 3, w]."""
    return t.argsort(2)[:, :, :3]


def _written(operator: Any, *more: Any, **options: Any) -> Call:
    """Rows of a tensor, written by an operator along the third dimension."""

    def write(t: torch.Tensor) -> torch.Tensor:
        return operator(t * 2, 2, _rows(t), *(m(t) if callable(m) else m for m in more), **options)

    return Call(write)


def _scattered(operator: Any, *more: Any, **options: Any) -> Call:
    """As `_written`, each column by an index of its own."""

    def write(t: torch.Tensor) -> torch.Tensor:
        given = (m(t) if callable(m) else m for m in more)
        return operator(t * 2, 2, _picked(t), *given, **options)

    return Call(write)


def _four(t: torch.Tensor) -> torch.Tensor:
    return t[:, :, :4].sin()


def _spectrum(t: torch.Tensor) -> torch.Tensor:
    return torch.fft.fft(t, dim=2)


def _both_parts(t: torch.Tensor) -> torch.Tensor:
    return torch.cat([t.real, t.imag], 2)


def _transformed(name: str, *args: Any, **options: Any) -> Call:
    """The magnitudes of a transform."""
    operator = getattr(aten, f"fft_{name}").default
    return Call(lambda t: operator(t, *args, **options).abs())


def _waves(t: torch.Tensor) -> torch.Tensor:
    """Every channel as a signal: [b c, f, frames]."""
    signal = t.flatten(2).flatten(0, 1)
    return torch.stft(signal, 8, 4, window=torch.hann_window(8).to(t), return_complex=True)


def _channels_of(lines: torch.Tensor) -> torch.Tensor:
    return lines.unflatten(0, (-1, 8))


def _affine(t: torch.Tensor) -> torch.Tensor:
    theta = t.mean((1, 3)).tanh().unflatten(1, (2, 3))
    return F.grid_sample(t, F.affine_grid(theta, list(t.shape), align_corners=False))


def _bright(t: torch.Tensor) -> torch.Tensor:
    image = t.mean((0, 1))
    return image > image.mean()


def _copied(t: torch.Tensor) -> torch.Tensor:
    wide = t.new_zeros(t.shape[0], 12, 6, 6)
    wide[:, 2:10] = t.relu()
    return wide


def _sampled(t: torch.Tensor) -> torch.Tensor:
    grid = t.mean(1)[:, :4, :, None].tanh().expand(-1, -1, -1, 2)
    return F.grid_sample(t, grid, align_corners=False)


def _gathered(t: torch.Tensor) -> torch.Tensor:
    order = t.mean(1).flatten(1).argsort(1)  # [b, t]
    return t.flatten(2).gather(2, order[:, None].expand(-1, 8, -1))


def _largest(t: torch.Tensor) -> torch.Tensor:
    """The row of the largest mean, for each image: an index that the data decide."""
    return t.mean((1, 3)).argmax(1)  # [b]


def _put(t: torch.Tensor, inplace: bool) -> torch.Tensor:
    rows, images = _largest(t), torch.arange(t.shape[0])
    wide = t.new_zeros(t.shape[0], 6, 8, 6)  # [b, h, c, w]
    values = t.tanh().amax(2)  # [b, c, w]
    put = wide.index_put_ if inplace else wide.index_put
    return put((images, rows), values) + 0.1 * t.transpose(1, 2)


def _boxes(t: torch.Tensor) -> torch.Tensor:
    corner = t.mean((1, 2, 3)).sigmoid()  # [b]
    zero, far = torch.zeros_like(corner), torch.full_like(corner, 4.5)
    image = torch.arange(t.shape[0]).to(t)
    return torch.stack([image, corner, zero, far, far], 1)  # [b, 5]


# Samples have weights from the moment that they are made: the same in every process.
torch.manual_seed(0)
SAMPLES: dict[Any, nn.Module] = {
    # movement
    aten.permute.default: Call(lambda t: t.permute(0, 2, 3, 1)),
    aten.transpose.int: Call(lambda t: t.transpose(1, 2)),
    aten.mT.default: Call(lambda t: aten.mT.default(t)),
    aten.t.default: Call(lambda t: t.mean((2, 3)).t().t()),
    aten.numpy_T.default: Call(lambda t: t.mean((2, 3)).T.T),
    aten.movedim.intlist: Call(lambda t: t.movedim((1, 2), (2, 3))),
    aten.swapdims.default: Call(lambda t: aten.swapdims.default(t, 1, 3)),
    aten.movedim.int: Call(lambda t: aten.movedim.int(t, 1, 3)),
    aten.swapaxes.default: Call(lambda t: aten.swapaxes.default(t, 1, 2)),
    aten.unsqueeze.default: Call(lambda t: t.unsqueeze(1)),
    aten.squeeze.dim: Call(lambda t: t.unsqueeze(1).squeeze(1)),
    aten.squeeze.dims: Call(lambda t: t.unsqueeze(1).unsqueeze(1).squeeze((1, 2))),
    aten.squeeze.default: Call(lambda t: t.unsqueeze(1).squeeze()),
    aten.rot90.default: Call(lambda t: t.rot90(1, (2, 3))),
    aten.fft_fftshift.default: Call(lambda t: torch.fft.fftshift(t, 2)),
    aten.fft_ifftshift.default: Call(lambda t: torch.fft.ifftshift(t, (2, 3))),
    aten.flatten.using_ints: Call(lambda t: t.flatten(1)),
    aten.unflatten.int: Call(lambda t: t.flatten(2).unflatten(2, (2, 18))),
    aten.expand.default: Call(lambda t: t.mean((2, 3), keepdim=True).expand(-1, -1, 3, 3)),
    aten.expand_as.default: Call(lambda t: t.mean((2, 3), keepdim=True).expand_as(t)),
    aten.view_as.default: Call(lambda t: t.flatten(2).view_as(t)),
    aten.reshape_as.default: Call(lambda t: t.flatten(2).reshape_as(t)),
    aten.repeat.default: Call(lambda t: t.repeat(1, 2, 1, 1)),
    aten.tile.default: Call(lambda t: t.tile(2, 1, 1)),
    aten.repeat_interleave.self_int: Call(lambda t: t.repeat_interleave(2, 1)),
    aten.diagonal.default: Call(lambda t: t.diagonal(0, 2, 3)),
    aten.unfold.default: Call(lambda t: t.unfold(2, 3, 1)),
    aten.select.int: Call(lambda t: t.select(2, 1)),
    aten.slice.Tensor: Call(lambda t: t[:, :, 1:4]),
    aten.narrow.default: Call(lambda t: t.narrow(3, 1, 2)),
    aten.roll.default: Call(lambda t: t.roll((1, 2), (2, 3))),
    aten.flip.default: Call(lambda t: t.flip(2)),
    aten.chunk.default: Call(lambda t: t.chunk(2, 1)[0] * t.chunk(2, 1)[1].sigmoid()),
    aten.split.Tensor: Call(lambda t: torch.cat(t.split(2, 2), 3)),
    aten.split_with_sizes.default: Call(lambda t: t.split_with_sizes([3, 5], 1)[1].relu()),
    aten.tensor_split.sections: Call(lambda t: t.tensor_split(3, 2)[1]),
    aten.tensor_split.indices: Call(lambda t: torch.cat(t.tensor_split([1, 3], 2)[:2], 2)),
    aten.unbind.int: Call(lambda t: t.unbind(2)[0]),
    aten.channel_shuffle.default: Call(lambda t: F.channel_shuffle(t, 2)),
    aten.pixel_shuffle.default: Call(lambda t: F.pixel_shuffle(t, 2)),
    aten.pixel_unshuffle.default: Call(lambda t: F.pixel_unshuffle(t, 2)),
    aten.view.default: Call(lambda t: t.view(-1, 2, 4, 36)),
    aten.reshape.default: Call(lambda t: t.transpose(2, 3).reshape(-1, 8, 36)),
    aten._unsafe_view.default: Call(lambda t: aten._unsafe_view.default(t, [t.shape[0], 288])),
    aten.contiguous.default: Call(lambda t: t.transpose(2, 3).contiguous()),
    aten.clone.default: Call(lambda t: t.clone()),
    aten.alias.default: Call(lambda t: aten.alias.default(t)),
    aten.detach.default: Call(lambda t: aten.detach.default(t)),
    aten.detach_.default: Call(lambda t: aten.detach_.default(t * 2)),
    aten.lift_fresh_copy.default: Call(lambda t: aten.lift_fresh_copy.default(t)),
    aten.to.dtype: Call(lambda t: aten.to.dtype(t, torch.float64)),
    aten.to.dtype_layout: Call(lambda t: aten.to.dtype_layout(t, dtype=torch.float64)),
    aten.to.device: Call(lambda t: aten.to.device(t, "cpu", torch.float64)),
    aten._to_copy.default: Call(lambda t: aten._to_copy.default(t, dtype=torch.float64)),
    aten.type_as.default: Call(lambda t: t.type_as(t)),
    aten.index.Tensor: Call(lambda t: t[:, [3, 1, 0, 7, 5, 2, 6, 4]]),
    aten.index_select.default: Call(
        lambda t: t.index_select(1, torch.arange(7, -1, -1, device=t.device))
    ),
    aten.gather.default: Call(_gathered),
    aten.pad.default: Call(lambda t: F.pad(t, (1, 2, 0, 1, 2, 2))),
    aten.constant_pad_nd.default: Call(lambda t: aten.constant_pad_nd.default(t, [0, 0, 1, 1])),
    aten.cat.default: Call(lambda t: torch.cat([t.relu(), t], 1)),
    aten.concat.default: Call(lambda t: aten.concat.default([t, t.tanh()], 2)),
    aten.slice_scatter.default: Call(lambda t: t.slice_scatter(t[:, ::2].tanh(), 1, 1, 8, 2)),
    aten.stack.default: Call(lambda t: torch.stack([t, t.tanh()], 1)),
    # contractions
    aten.linear.default: Call(lambda t, f: f(_tokens(t)), nn.Linear(8, 5)),
    aten.addmm.default: Call(
        lambda t, w, b: torch.addmm(b, t.mean((2, 3)), w), torch.randn(8, 5), torch.randn(5)
    ),
    aten.baddbmm.default: Call(
        lambda t, w, b: torch.baddbmm(b, _tokens(t), w.expand(t.shape[0], -1, -1)),
        torch.randn(8, 5),
        torch.randn(5),
    ),
    aten.matmul.default: Call(lambda t, f: _scores(t, f, torch.matmul), _inner()),
    aten.mm.default: Call(lambda t, w: torch.mm(t.mean((2, 3)), w), torch.randn(8, 5)),
    aten.bmm.default: Call(lambda t, f: _scores(t, f, _bmm), _inner()),
    aten.einsum.default: Call(lambda t, w: torch.einsum("bchw,co->bohw", t, w), torch.randn(8, 5)),
    aten.conv1d.default: Call(lambda t, f: f(t.flatten(2)), nn.Conv1d(8, 6, 3)),
    aten.conv2d.default: Call(lambda t, f: f(t), nn.Conv2d(8, 6, 3, groups=2)),
    aten.conv3d.default: Call(lambda t, f: f(t.unsqueeze(2)), nn.Conv3d(8, 6, (1, 3, 3))),
    aten.conv_transpose1d.default: Call(lambda t, f: f(t.flatten(2)), nn.ConvTranspose1d(8, 6, 3)),
    aten.conv_transpose2d.input: Call(lambda t, f: f(t), nn.ConvTranspose2d(8, 6, 3, groups=2)),
    aten.conv_transpose3d.input: Call(
        lambda t, f: f(t.unsqueeze(2)), nn.ConvTranspose3d(8, 6, (1, 3, 3))
    ),
    aten.scaled_dot_product_attention.default: Call(_attend, _inner()),
    aten.conv1d.padding: Call(lambda t, f: f(t.flatten(2)), nn.Conv1d(8, 6, 3, padding="same")),
    aten.conv2d.padding: Call(lambda t, f: f(t), nn.Conv2d(8, 6, 3, padding="same", groups=2)),
    aten.conv3d.padding: Call(lambda t, f: f(t.unsqueeze(2)), nn.Conv3d(8, 6, 3, padding="same")),
    aten.mv.default: Call(
        lambda t, w, v: F.linear(t.mean((2, 3)), w * torch.mv(w, v)[:, None]), *_matrix()
    ),
    aten.dot.default: Call(
        lambda t, w, v: F.linear(t.mean((2, 3)), w * (1 + torch.dot(w.mean(0), v))), *_matrix()
    ),
    aten.vdot.default: Call(
        lambda t, w, v: F.linear(t.mean((2, 3)), w * (1 + torch.vdot(w.mean(0), v))), *_matrix()
    ),
    aten.outer.default: Call(
        lambda t, w: torch.outer(t.mean((1, 2, 3)), w) + t.mean((2, 3)), torch.randn(8)
    ),
    aten.inner.default: Call(lambda t, w: torch.inner(_tokens(t), w), torch.randn(5, 8)),
    aten.tensordot.default: Call(
        lambda t, w: torch.tensordot(t, w, dims=([1], [0])), torch.randn(8, 5)
    ),
    aten.bilinear.default: Call(lambda t, f: f(_tokens(t), _tokens(t)), nn.Bilinear(8, 8, 5)),
    # recurrent layers
    aten.lstm.input: Call(
        lambda t, f: f(_tokens(t))[0],
        nn.LSTM(8, 6, 2, batch_first=True, bidirectional=True, proj_size=3),
    ),
    aten.gru.input: Call(_with_last_states, nn.GRU(8, 6, 2, batch_first=True)),
    aten.rnn_tanh.input: Call(lambda t, f: f(_tokens(t))[0], nn.RNN(8, 6, batch_first=True)),
    aten.rnn_relu.input: Call(
        lambda t, f: f(_tokens(t))[0], nn.RNN(8, 6, batch_first=True, nonlinearity="relu")
    ),
    aten.lstm_cell.default: Call(lambda t, f: _unroll(t, f, 2), nn.LSTMCell(8, 6)),
    aten.gru_cell.default: Call(lambda t, f: _unroll(t, f, 1), nn.GRUCell(8, 6)),
    aten.rnn_tanh_cell.default: Call(lambda t, f: _unroll(t, f, 1), nn.RNNCell(8, 6)),
    aten.rnn_relu_cell.default: Call(
        lambda t, f: _unroll(t, f, 1), nn.RNNCell(8, 6, nonlinearity="relu")
    ),
    # tables
    aten.embedding.default: Call(lambda t, f: f(_numbers(t)), nn.Embedding(10, 6)),
    aten.embedding_bag.default: Call(
        lambda t, w: aten.embedding_bag.default(
            w, _numbers(t).flatten(), 36 * torch.arange(t.shape[0])
        )[0],
        torch.randn(10, 6),
    ),
    aten.embedding_bag.padding_idx: Call(
        lambda t, f: f(_numbers(t).flatten(1)[:, :3]), nn.EmbeddingBag(10, 6, mode="max")
    ),
    aten.embedding_renorm_.default: Call(
        lambda t, f: f(_numbers(t)), nn.Embedding(10, 6, max_norm=1.0)
    ),
    # normalisation
    aten._weight_norm.default: Call(lambda t, f: f(t), weight_norm(nn.Conv2d(8, 6, 3))),
    aten._weight_norm_interface.default: Call(
        lambda t, w, g: F.linear(_tokens(t), aten._weight_norm_interface(w, g, 0)[0]),
        torch.randn(6, 8),
        torch.randn(6, 1),
    ),
    aten.batch_norm.default: Call(lambda t, f: f(t), nn.BatchNorm2d(8)),
    aten.instance_norm.default: Call(lambda t, f: f(t), nn.InstanceNorm2d(8, affine=True)),
    aten.layer_norm.default: Call(lambda t, f: f(_tokens(t)), nn.LayerNorm(8)),
    aten.rms_norm.default: Call(lambda t, f: f(_tokens(t)), nn.RMSNorm(8)),
    aten.group_norm.default: Call(lambda t, f: f(t), nn.GroupNorm(4, 8)),
    aten.softmax.int: Call(lambda t: t.softmax(1)),
    aten._softmax.default: Call(lambda t: aten._softmax.default(t, 1, False)),
    aten.log_softmax.int: Call(lambda t: t.log_softmax(1)),
    aten._log_softmax.default: Call(lambda t: aten._log_softmax.default(t, 1, False)),
    # pooling and reductions
    aten.max_pool1d.default: _pool1d(F.max_pool1d),
    aten.max_pool2d.default: Call(lambda t: F.max_pool2d(t, 2)),
    aten.max_pool3d.default: _pool3d(F.max_pool3d),
    aten.avg_pool1d.default: _pool1d(F.avg_pool1d),
    aten.avg_pool2d.default: Call(lambda t: F.avg_pool2d(t, 2)),
    aten.avg_pool3d.default: _pool3d(F.avg_pool3d),
    aten.adaptive_avg_pool1d.default: _pool1d(F.adaptive_avg_pool1d),
    aten.adaptive_avg_pool2d.default: Call(lambda t: F.adaptive_avg_pool2d(t, 2)),
    aten.adaptive_avg_pool3d.default: _pool3d(F.adaptive_avg_pool3d),
    aten.max_pool1d_with_indices.default: _pool1d(partial(F.max_pool1d, return_indices=True)),
    aten.max_pool2d_with_indices.default: Call(
        lambda t: _indexed(F.max_pool2d(t, 2, return_indices=True))
    ),
    aten.max_pool3d_with_indices.default: _pool3d(partial(F.max_pool3d, return_indices=True)),
    aten.adaptive_max_pool1d.default: _pool1d(partial(F.adaptive_max_pool1d, return_indices=True)),
    aten.adaptive_max_pool2d.default: Call(lambda t: F.adaptive_max_pool2d(t, 2)),
    aten.adaptive_max_pool3d.default: _pool3d(partial(F.adaptive_max_pool3d, return_indices=True)),
    aten.fractional_max_pool2d.default: Call(
        lambda t: aten.fractional_max_pool2d(t, [2, 2], [3, 3], _windows(t, 2))[0]
    ),
    aten.fractional_max_pool3d.default: Call(
        lambda t: _fractional3d(t.unsqueeze(2).repeat(1, 1, 4, 1, 1))
    ),
    aten.max_unpool2d.default: Call(
        lambda t: F.max_unpool2d(*F.max_pool2d(t, 2, return_indices=True), 2)
    ),
    aten.max_unpool3d.default: Call(
        lambda t: F.max_unpool3d(
            *F.max_pool3d(t[:, :, None], (1, 2, 2), return_indices=True), (1, 2, 2)
        )
    ),
    aten.im2col.default: Call(lambda t: F.unfold(t, 3)),
    aten.col2im.default: Call(lambda t: F.fold(t.flatten(2)[:, :, :25], (6, 6), 2)),
    aten.cosine_similarity.default: Call(lambda t: F.cosine_similarity(t, t.roll(1, 2), 1)),
    aten.pairwise_distance.default: Call(
        lambda t: F.pairwise_distance(_tokens(t), _tokens(t).roll(1, 1))
    ),
    aten.upsample_nearest1d.vec: Call(lambda t: F.interpolate(t.flatten(2), scale_factor=2)),
    aten.upsample_nearest2d.vec: Call(lambda t: F.interpolate(t, scale_factor=2)),
    aten.upsample_nearest3d.vec: Call(
        lambda t: F.interpolate(t.unsqueeze(2), scale_factor=(1, 2, 2))
    ),
    aten._upsample_nearest_exact1d.vec: Call(
        lambda t: F.interpolate(t.flatten(2), scale_factor=2, mode="nearest-exact")
    ),
    aten._upsample_nearest_exact2d.vec: Call(
        lambda t: F.interpolate(t, scale_factor=2, mode="nearest-exact")
    ),
    aten._upsample_nearest_exact3d.vec: Call(
        lambda t: F.interpolate(t.unsqueeze(2), scale_factor=(1, 2, 2), mode="nearest-exact")
    ),
    aten._upsample_bilinear2d_aa.vec: Call(
        lambda t: F.interpolate(t, scale_factor=0.5, mode="bilinear", antialias=True)
    ),
    aten._upsample_bicubic2d_aa.vec: Call(
        lambda t: F.interpolate(t, scale_factor=0.5, mode="bicubic", antialias=True)
    ),
    aten.upsample_linear1d.vec: Call(
        lambda t: F.interpolate(t.flatten(2), scale_factor=2, mode="linear")
    ),
    aten.upsample_bilinear2d.vec: Call(lambda t: F.interpolate(t, scale_factor=2, mode="bilinear")),
    aten.upsample_bicubic2d.vec: Call(lambda t: F.interpolate(t, scale_factor=2, mode="bicubic")),
    aten.upsample_trilinear3d.vec: Call(
        lambda t: F.interpolate(t.unsqueeze(2), scale_factor=(1, 2, 2), mode="trilinear")
    ),
    aten.mean.dim: Call(lambda t: t.mean((2, 3))),
    aten.mean.default: Call(lambda t: t * t.mean()),
    aten.sum.dim_IntList: Call(lambda t: t.sum(2)),
    aten.sum.default: Call(lambda t: t * t.sum().tanh()),
    aten.amax.default: Call(lambda t: t.amax(1)),
    aten.amin.default: Call(lambda t: t.amin((2, 3))),
    aten.linalg_vector_norm.default: Call(lambda t: F.normalize(t, dim=1)),
    aten.var.default: Call(lambda t: t * aten.var.default(t)),
    aten.var.dim: Call(lambda t: t / t.var(1, keepdim=True).sqrt()),
    aten.var.correction: Call(lambda t: t.var((2, 3), correction=0)),
    aten.std.default: Call(lambda t: t * aten.std.default(t)),
    aten.std.dim: Call(lambda t: t / aten.std.dim(t, [1], True, True)),
    aten.std.correction: Call(lambda t: t.std((2, 3), correction=0)),
    aten.var_mean.default: Call(lambda t: t * aten.var_mean.default(t)[0]),
    aten.var_mean.dim: Call(lambda t: torch.cat(aten.var_mean.dim(t, [2, 3]), 1)),
    aten.var_mean.correction: Call(lambda t: t / aten.var_mean.correction(t, [1], keepdim=True)[0]),
    aten.std_mean.default: Call(lambda t: t * aten.std_mean.default(t)[0]),
    aten.std_mean.dim: Call(lambda t: torch.cat(aten.std_mean.dim(t, [2, 3]), 1)),
    aten.std_mean.correction: Call(lambda t: t - aten.std_mean.correction(t, [1], keepdim=True)[1]),
    aten.norm.Scalar: Call(lambda t: t / aten.norm.Scalar(t)),
    aten.norm.ScalarOpt_dim: Call(lambda t: t / aten.norm.ScalarOpt_dim(t, 2, [1], True)),
    aten.logsumexp.default: Call(lambda t: t.logsumexp((2, 3))),
    aten.prod.default: Call(lambda t: t + t.tanh().mean((2, 3)).prod()),
    aten.prod.dim_int: Call(lambda t: t.tanh().prod(2)),
    aten.max.default: Call(lambda t: t / t.max()),
    aten.min.default: Call(lambda t: t - t.min()),
    aten.any.default: Call(lambda t: t * (t > 0).any()),
    aten.any.dim: Call(lambda t: t * (t > 1).any(2, keepdim=True)),
    aten.all.default: Call(lambda t: t * (1 + (t > 0).all())),
    aten.all.dim: Call(lambda t: t * (1 + (t > -1).all(2, keepdim=True))),
    aten.aminmax.default: Call(lambda t: t - torch.aminmax(t, dim=1, keepdim=True)[0]),
    aten.max.dim: Call(lambda t: t.flatten(2).max(2).values),
    aten.min.dim: Call(lambda t: t.flatten(2).min(2).values),
    aten.median.dim: Call(lambda t: t.flatten(2).median(2).values),
    aten.nanmedian.dim: Call(lambda t: t.flatten(2).nanmedian(2).values),
    aten.kthvalue.default: Call(lambda t: t.flatten(2).kthvalue(3, 2).values),
    aten.mode.default: Call(lambda t: t.flatten(2).mode(2).values),
    aten.argmax.default: Call(lambda t: t.flatten(2).argmax(2) * t.mean((2, 3))),
    aten.argmin.default: Call(lambda t: t.flatten(2).argmin(2) * t.mean((2, 3))),
    # in order along a dimension
    aten.cumsum.default: Call(lambda t: t.cumsum(2)),
    aten.cumprod.default: Call(lambda t: t.tanh().cumprod(2)),
    aten.logcumsumexp.default: Call(lambda t: t.logcumsumexp(2)),
    aten.cummax.default: Call(lambda t: t.cummax(2)[0]),
    aten.cummin.default: Call(lambda t: t.cummin(2)[0]),
    aten.sort.default: Call(lambda t: t.flatten(2).sort(2)[0]),
    aten.sort.stable: Call(lambda t: torch.sort(t.flatten(2), dim=2, stable=True)[0]),
    aten.argsort.default: Call(lambda t: t.flatten(2).argsort(2) * t.flatten(2)),
    aten.topk.default: Call(lambda t: t.flatten(2).topk(3, 2).values),
    aten.tril.default: Call(lambda t: t.tril()),
    aten.triu.default: Call(lambda t: t.triu(1)),
    aten.where.default: Call(lambda t: t * aten.where.default(_bright(t))[1].double().mean()),
    aten.nonzero.default: Call(lambda t: t * _bright(t).nonzero().double().mean(0)[0]),
    aten.nonzero_numpy.default: Call(
        lambda t: t * aten.nonzero_numpy.default(_bright(t))[1].double().mean()
    ),
    # Fourier transforms and complex numbers
    aten.fft_fft.default: _transformed("fft", None, 2),
    aten.fft_ifft.default: _transformed("ifft"),
    aten.fft_rfft.default: _transformed("rfft", 4, 2),
    aten.fft_irfft.default: _transformed("irfft", 8, 3),
    aten.fft_hfft.default: _transformed("hfft"),
    aten.fft_ihfft.default: _transformed("ihfft"),
    aten.fft_fft2.default: _transformed("fft2"),
    aten.fft_ifft2.default: _transformed("ifft2"),
    aten.fft_rfft2.default: _transformed("rfft2", [4, 4]),
    aten.fft_irfft2.default: _transformed("irfft2"),
    aten.fft_fftn.default: _transformed("fftn", [4, 4]),
    aten.fft_ifftn.default: _transformed("ifftn", None, [2, 3]),
    aten.fft_rfftn.default: _transformed("rfftn", None, [3]),
    aten.fft_irfftn.default: _transformed("irfftn", None, [2]),
    aten.stft.default: Call(lambda t: _channels_of(_waves(t).abs())),
    aten.stft.center: Call(
        lambda t: _channels_of(
            aten.stft.center(t.flatten(2).flatten(0, 1), 8, 4, return_complex=True).abs()
        )
    ),
    aten.istft.default: Call(lambda t: _channels_of(torch.istft(_waves(t), 8, 4))),
    aten.view_as_complex.default: Call(
        lambda t: torch.view_as_complex(t.unflatten(3, (3, 2))).abs()
    ),
    aten.view_as_real.default: Call(lambda t: torch.view_as_real(_spectrum(t))),
    aten.real.default: Call(lambda t: _spectrum(t).real),
    aten.imag.default: Call(lambda t: _spectrum(t).imag + t),
    aten._conj.default: Call(lambda t: _both_parts(aten._conj.default(_spectrum(t)))),
    aten.conj.default: Call(lambda t: _both_parts(aten.conj.default(_spectrum(t)))),
    aten.resolve_conj.default: Call(
        lambda t: _both_parts(aten.resolve_conj.default(_spectrum(t).conj()))
    ),
    aten.resolve_neg.default: Call(lambda t: aten.resolve_neg.default(_spectrum(t).imag) + t),
    # sampling
    aten.affine_grid_generator.default: Call(_affine),
    aten.grid_sampler.default: Call(_sampled),
    # creation
    aten.zeros.default: _fill(lambda t: torch.zeros(t.shape[0], 1, 6, 6, dtype=t.dtype)),
    aten.ones.default: _fill(lambda t: torch.ones(t.shape[0], 1, 6, 6, dtype=t.dtype)),
    aten.full.default: _fill(lambda t: torch.full((t.shape[0], 1, 6, 6), 0.5, dtype=t.dtype)),
    aten.new_zeros.default: _fill(lambda t: t.new_zeros(t.shape[0], 8, 6, 6)),
    aten.new_ones.default: _fill(lambda t: t.new_ones(t.shape[0], 8, 6, 6)),
    aten.new_full.default: _fill(lambda t: t.new_full((t.shape[0], 8, 6, 6), 0.5)),
    aten.zeros_like.default: _fill(torch.zeros_like),
    aten.ones_like.default: _fill(torch.ones_like),
    aten.full_like.default: _fill(lambda t: torch.full_like(t, 0.5)),
    aten.arange.default: _fill(lambda t: torch.arange(t.shape[0]).view(-1, 1, 1, 1)),
    aten.arange.start: _fill(lambda t: torch.arange(1, t.shape[0] + 1).view(-1, 1, 1, 1)),
    aten.arange.start_step: _fill(lambda t: torch.arange(0, 2 * t.shape[0], 2).view(-1, 1, 1, 1)),
    # writing in place
    aten.zero_.default: Call(_zeroed),
    aten.fill_.Scalar: Call(_filled),
    aten.fill_.Tensor: Call(_filled_with),
    aten.copy_.default: Call(_copied),
    # selection by data
    aten.index_put.default: Call(lambda t: _put(t, inplace=False)),
    aten.index_put_.default: Call(lambda t: _put(t, inplace=True)),
    aten.index_add.default: _written(torch.index_add, _four),
    aten.index_add_.default: _written(torch.Tensor.index_add_, _four),
    aten.index_copy.default: _written(torch.index_copy, _four),
    aten.index_copy_.default: _written(torch.Tensor.index_copy_, _four),
    aten.index_reduce.default: _written(torch.index_reduce, _four, "amax"),
    aten.index_reduce_.default: _written(torch.Tensor.index_reduce_, _four, "mean"),
    aten.index_fill.int_Scalar: _written(torch.index_fill, 0.5),
    aten.index_fill_.int_Scalar: _written(torch.Tensor.index_fill_, 0.5),
    aten.index_fill.int_Tensor: _written(torch.index_fill, _half),
    aten.index_fill_.int_Tensor: _written(torch.Tensor.index_fill_, _half),
    aten.scatter.src: _scattered(torch.scatter, _four),
    aten.scatter_.src: _scattered(torch.Tensor.scatter_, _four),
    aten.scatter.value: _scattered(torch.scatter, 0.5),
    aten.scatter_.value: _scattered(torch.Tensor.scatter_, 0.5),
    aten.scatter.reduce: _scattered(torch.scatter, _four, reduce="add"),
    aten.scatter_.reduce: _scattered(torch.Tensor.scatter_, _four, reduce="multiply"),
    aten.scatter.value_reduce: _scattered(torch.scatter, 0.5, reduce="add"),
    aten.scatter_.value_reduce: _scattered(torch.Tensor.scatter_, 0.5, reduce="multiply"),
    aten.scatter_add.default: _scattered(torch.scatter_add, _four),
    aten.scatter_add_.default: _scattered(torch.Tensor.scatter_add_, _four),
    aten.scatter_reduce.two: _scattered(torch.scatter_reduce, _four, "amax"),
    aten.scatter_reduce_.two: _scattered(torch.Tensor.scatter_reduce_, _four, "mean"),
    aten.segment_reduce.default: Call(
        lambda t: torch.segment_reduce(
            t.permute(2, 0, 1, 3).contiguous(), "max", lengths=torch.tensor([2, 4])
        ).transpose(0, 1)
    ),
    aten.take_along_dim.default: Call(
        lambda t: torch.take_along_dim(t, t.mean(1, keepdim=True).argsort(2), 2)
    ),
    aten.searchsorted.Tensor: Call(lambda t: torch.searchsorted(t.sort(3)[0], t.tanh()) + t.sin()),
    aten.bucketize.Tensor: Call(
        lambda t: torch.bucketize(t, torch.linspace(-1, 1, 5).to(t)) + t.sin()
    ),
    # sampling
    "torchvision::roi_align": Call(lambda t: torchvision().ops.roi_align(t, _boxes(t), 3)),
    "torchvision::roi_pool": Call(lambda t: torchvision().ops.roi_pool(t, _boxes(t), 3)),
    # pointwise operators without torch's tag
    aten.glu.default: Call(lambda t: F.glu(t, 1)),
    aten.dropout.default: Call(lambda t: F.dropout(t, 0.5, training=False)),
    aten.dropout_.default: Call(lambda t: F.dropout(t * 2, 0.5, training=False, inplace=True)),
    aten.feature_dropout.default: Call(lambda t: F.dropout2d(t, 0.5, training=False)),
    aten.feature_dropout_.default: Call(lambda t: aten.feature_dropout_.default(t * 2, 0.5, False)),
    aten.alpha_dropout.default: Call(lambda t: F.alpha_dropout(t, 0.5, training=False)),
    aten.alpha_dropout_.default: Call(lambda t: aten.alpha_dropout_.default(t * 2, 0.5, False)),
    aten.feature_alpha_dropout.default: Call(
        lambda t: F.feature_alpha_dropout(t, 0.5, training=False)
    ),
    aten.feature_alpha_dropout_.default: Call(
        lambda t: aten.feature_alpha_dropout_.default(t * 2, 0.5, False)
    ),
    aten.abs_.default: Call(lambda t: aten.abs_.default(t * 2)),
    aten.rrelu_.default: Call(lambda t: F.rrelu(t * 2, training=False, inplace=True)),
    aten.gelu_.default: Call(lambda t: aten.gelu_.default(t * 2)),
    aten.elu_.default: Call(lambda t: F.elu(t * 2, inplace=True)),
    aten.hardtanh.default: Call(lambda t: F.hardtanh(t)),
    aten.hardtanh_.default: Call(lambda t: F.hardtanh(t * 2, inplace=True)),
    aten.hardswish.default: Call(lambda t: F.hardswish(t)),
    aten.hardswish_.default: Call(lambda t: F.hardswish(t * 2, inplace=True)),
    aten.hardsigmoid_.default: Call(lambda t: F.hardsigmoid(t * 2, inplace=True)),
    aten.leaky_relu_.default: Call(lambda t: F.leaky_relu(t * 2, inplace=True)),
    aten.silu_.default: Call(lambda t: F.silu(t * 2, inplace=True)),
    aten.mish_.default: Call(lambda t: F.mish(t * 2, inplace=True)),
    aten.relu6.default: Call(lambda t: aten.relu6.default(t)),
    aten.relu6_.default: Call(lambda t: aten.relu6_.default(t * 2)),
    aten.selu.default: Call(lambda t: F.selu(t)),
    aten.selu_.default: Call(lambda t: F.selu(t * 2, inplace=True)),
    aten.celu_.default: Call(lambda t: F.celu(t * 2, inplace=True)),
    aten.softplus.default: Call(lambda t: F.softplus(t)),
    aten.threshold_.default: Call(lambda t: F.threshold(t * 2, 0.1, 0.2, inplace=True)),
    aten.prelu.default: Call(lambda t, f: f(t), nn.PReLU(8)),
    aten.log_sigmoid.default: Call(lambda t: F.logsigmoid(t)),
    aten.masked_fill.Scalar: Call(lambda t: t.masked_fill(t > 1, 0.5)),
    aten.masked_fill_.Scalar: Call(lambda t: (t * 2).masked_fill_(t > 1, 0.5)),
    aten.masked_fill.Tensor: Call(lambda t: t.masked_fill(t > 1, _half(t))),
    aten.masked_fill_.Tensor: Call(lambda t: (t * 2).masked_fill_(t > 1, _half(t))),
    aten.where.ScalarOther: Call(lambda t: aten.where.ScalarOther(t > 0, t, 0.5)),
    aten.where.ScalarSelf: Call(lambda t: aten.where.ScalarSelf(t > 0, 0.5, t)),
    aten.where.Scalar: Call(lambda t: aten.where.Scalar(t > 0, 0.5, -1.5) * t),
    aten.rsub.Tensor: Call(lambda t: torch.rsub(t, t.tanh())),
    aten.floor_divide.default: Call(lambda t: torch.floor_divide(t * 9, t.exp()) + t),
    aten.floor_divide.Scalar: Call(lambda t: aten.floor_divide.Scalar(t * 9, 2) + t),
    aten.arctan2.default: Call(lambda t: torch.arctan2(t, t.exp())),
    aten.less.Tensor: Call(lambda t: torch.less(t, t.tanh() * 2) * t),
    aten.less.Scalar: Call(lambda t: torch.less(t, 0.5) * t),
    aten.greater.Tensor: Call(lambda t: torch.greater(t, t.tanh() * 2) * t),
    aten.greater.Scalar: Call(lambda t: torch.greater(t, 0.5) * t),
    aten.__and__.Tensor: Call(lambda t: aten.__and__.Tensor(t > 0, t < 1) * t),
    aten.__or__.Tensor: Call(lambda t: aten.__or__.Tensor(t < 0, t > 1) * t),
    aten.__xor__.Tensor: Call(lambda t: aten.__xor__.Tensor(t < 0, t < 1) * t),
    aten.complex.default: Call(lambda t: torch.complex(t, t.sin()).abs()),
    aten.polar.default: Call(lambda t: _both_parts(torch.polar(t.exp(), t))),
    aten.isreal.default: Call(lambda t: aten.isreal.default(_spectrum(t)) * t + t),
}


#: Indexing by data along dimensions that carry no label, in each of its forms.
BY_DATA: dict[str, nn.Module] = {
    "one index": Call(lambda t: t[:, :, _largest(t)].mean(2)),
    "pairs": Call(lambda t: t[torch.arange(t.shape[0]), :, _largest(t)]),
    "adjacent": Call(
        lambda t: t.transpose(0, 1)[:, torch.arange(t.shape[0]), _largest(t)].mean(2).t()
    ),
    "of two dimensions": Call(
        lambda t: t[:, :, torch.stack([_largest(t), _largest(-t)])].mean((2, 3))
    ),
    "mask of pixels": Call(lambda t: t.permute(2, 3, 0, 1)[t.mean((0, 1)) > t.mean()].mean(0)),
}


#: What is chosen or sorted among the channels, of which nobody asks where it stood.
BY_VALUE: dict[str, nn.Module] = {
    "max": Call(lambda t: t * t.max(1, keepdim=True)[0]),
    "min": Call(lambda t: t * t.min(1, keepdim=True).values),
    "median": Call(lambda t: t - t.median(1, keepdim=True)[0]),
    "kthvalue": Call(lambda t: t - t.kthvalue(3, 1, keepdim=True)[0]),
    "mode": Call(lambda t: t.round().mode(1)[0] + t.mean(1)),
    "topk": Call(lambda t: t.topk(3, 1)[0]),
    "sort": Call(lambda t: t.sort(1)[0]),
}


def _einsum(equation: str, *tensors: torch.Tensor) -> Call:
    return Call(lambda t, *own: torch.einsum(equation, t, *own), *tensors)


#: Forms of einsum.
EINSUMS: dict[str, nn.Module] = {
    "three operands": _einsum("bchw,co,cw->bohw", torch.randn(8, 5), torch.randn(8, 6)),
    "a chain of weights": _einsum("bchw,cr,ro->bohw", torch.randn(8, 3), torch.randn(3, 5)),
    "an ellipsis": Call(
        lambda t, w: torch.einsum("...c,...co->...o", _tokens(t), w), torch.randn(36, 8, 5)
    ),
    "an ellipsis that is summed over": _einsum("bc...,co->bo", torch.randn(8, 5)),
    "a repeated letter": _einsum("bchh,co->bho", torch.randn(8, 5)),
    "a repeated letter of a weight": _einsum("bchw,cc->bchw", torch.randn(8, 8)),
    "no arrow": _einsum("bchw,co", torch.randn(8, 5)),
    "no arrow, an ellipsis": Call(
        lambda t, w: torch.einsum("bc...,oc", t, w).movedim(2, 0), torch.randn(5, 8)
    ),
    "one operand": _einsum("bchw->bwc"),
    "experts": Call(
        lambda t, up, down: torch.einsum(
            "...eh,ehi,...e->...i",
            torch.einsum("...i,eih->...eh", _tokens(t), up),
            down,
            _tokens(t)[..., :3].softmax(-1),
        ),
        torch.randn(3, 8, 6),
        torch.randn(3, 6, 8),
    ),
}


class Net(nn.Module):
    """convolution → sample → linear."""

    def __init__(self, sample: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.sample = sample
        self.head = nn.LazyLinear(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.sample(self.conv(x)).flatten(1))
