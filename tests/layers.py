"""The usual layers of torch.nn, each between two others.

Every entry of `LAYERS` is one network: `Images` (convolution → layer → linear), `Tokens` (linear →
layer → linear) or `Numbers` (layer → linear). The layer sees 8 channels that are neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from tests.models import excite


class Call(nn.Module):
    """A function of layers and inputs."""

    def __init__(self, function: Callable[..., torch.Tensor], *layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        self.layers = nn.ModuleList(layers)

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.function(*self.layers, *inputs)


class Images(nn.Module):
    """[b, 3, 6, 6] → convolution → layer on [b, 8, 6, 6] → linear → [b, 4]."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.layer = layer
        self.head = nn.LazyLinear(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(self.first(x)).flatten(1))

    @staticmethod
    def example(batch: int) -> tuple[torch.Tensor, ...]:
        return (torch.randn(batch, 3, 6, 6, dtype=torch.float64),)


class Tokens(nn.Module):
    """[b, 5, 6] → linear → layer on [b, 5, 8] → linear → [b, *, 4]."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.layer = layer
        self.head = nn.LazyLinear(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(self.first(x)))

    @staticmethod
    def example(batch: int) -> tuple[torch.Tensor, ...]:
        return (torch.randn(batch, 5, 6, dtype=torch.float64),)


class Pair(Tokens):
    """[b, 5, 6] and [b, 3, 6] → linear → layer of both."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return self.head(self.layer(self.first(x), self.first(y)))

    @staticmethod
    def example(batch: int) -> tuple[torch.Tensor, ...]:
        return (*Tokens.example(batch), torch.randn(batch, 3, 6, dtype=torch.float64))


class Numbers(nn.Module):
    """Integers [b, 5] → layer → linear."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.head = nn.LazyLinear(4)

    def forward(self, *x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(*x))

    @staticmethod
    def example(batch: int) -> tuple[torch.Tensor, ...]:
        return (torch.randint(0, 10, (batch, 5)),)


class Weighted(Numbers):
    """Integers [b, 5] and weights [b, 5] → layer → linear."""

    @staticmethod
    def example(batch: int) -> tuple[torch.Tensor, ...]:
        return (*Numbers.example(batch), torch.rand(batch, 5, dtype=torch.float64))


@dataclass(frozen=True)
class Layer:
    """One case.

    Attributes:
        network: What stands around the layer.
        build: Makes the layer.
        fixed: Parameters of which no dimension is free, besides the head's bias.
        free: Places that must be free, besides one dimension of every other parameter.
        mixes: Whether the concatenation is no ensemble, by the layer's mathematics.
    """

    network: type[nn.Module]
    build: Callable[[], nn.Module]
    fixed: Iterable[str] = ()
    free: Iterable[tuple[str, int]] = ()
    mixes: bool = False

    def member(self, seed: int) -> nn.Module:
        """A network in eval mode, excited, float64."""
        torch.manual_seed(seed)
        model = self.network(self.build()).double()
        example: Any = self.network
        torch.manual_seed(0)
        model(*example.example(4))
        torch.manual_seed(seed)
        return excite(model, example.example(4))

    def example(self) -> tuple[torch.Tensor, ...]:
        """Inputs with a batch of 2."""
        torch.manual_seed(1)
        network: Any = self.network
        return network.example(2)


def _images(build: Callable[[], nn.Module], **options: Any) -> Layer:
    return Layer(Images, build, **options)


def _tokens(build: Callable[[], nn.Module], **options: Any) -> Layer:
    return Layer(Tokens, build, **options)


def _lines(build: Callable[[], nn.Module], **options: Any) -> Layer:
    """The pixels in one line: [b, 8, 36]."""
    return _images(lambda: Call(lambda f, t: f(t.flatten(2)), build()), **options)


def _volumes(build: Callable[[], nn.Module], **options: Any) -> Layer:
    """[b, 8, 2, 3, 6]."""
    return _images(lambda: Call(lambda f, t: f(t.unflatten(2, (2, 3))), build()), **options)


def _calls(function: Callable[..., torch.Tensor], *builds: Callable[[], nn.Module]) -> Any:
    return lambda: Call(function, *(build() for build in builds))


def _unroll(cell: Any, t: torch.Tensor, states: int) -> torch.Tensor:
    """Three steps of a cell; the last of its states."""
    zero = t.new_zeros(t.shape[0], 6)
    state: Any = (zero, zero) if states == 2 else zero
    for step in t[:, :3].unbind(1):
        state = cell(step, state)
    return state[1] if states == 2 else state


class LearnedStart(nn.Module):
    """A GRU whose first state is a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(8, 6, batch_first=True)
        self.start = nn.Parameter(torch.randn(1, 1, 6))

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        return self.gru(t, self.start.expand(-1, t.shape[0], -1))[0]


class LowRank(nn.Module):
    """A linear layer whose weight is a product."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Parameter(torch.randn(6, 3))
        self.right = nn.Parameter(torch.randn(3, 8))

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        return F.linear(t, self.left @ self.right)


class Standardised(nn.Module):
    """Mean 0 and variance 1 over each output channel."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        mean = weight.mean((1, 2, 3), keepdim=True)
        return (weight - mean) / (weight.pow(2).mean((1, 2, 3), keepdim=True) + 1e-5).sqrt()


class Symmetric(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + weight.t()


class Positive(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return F.softplus(weight)


def _parametrized(layer: nn.Module, how: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", how)
    return layer


ACTIVATIONS = (
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.ELU,
    nn.SELU,
    nn.CELU,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.Hardswish,
    nn.Hardsigmoid,
    nn.Hardtanh,
    nn.Hardshrink,
    nn.Softshrink,
    nn.Softplus,
    nn.Softsign,
    nn.Tanh,
    nn.Tanhshrink,
    nn.Sigmoid,
    nn.LogSigmoid,
    nn.RReLU,
)

_LSTM = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")

_ONE_UNIT = [
    f"layer.layers.0.{tensor}{direction}"
    for direction in ("", "_reverse")
    for tensor in (*_LSTM[1:], *(name.replace("l0", "l1") for name in _LSTM))
]

LAYERS = {
    # convolutions
    "Conv1d": _lines(lambda: nn.Conv1d(8, 6, 3, dilation=2)),
    "Conv2d grouped": _images(lambda: nn.Conv2d(8, 12, 3, groups=4)),
    "Conv2d depthwise": _images(lambda: nn.Conv2d(8, 16, 3, groups=8)),
    "Conv2d same": _images(lambda: nn.Conv2d(8, 6, 3, padding="same", groups=2)),
    "Conv1d same": _lines(lambda: nn.Conv1d(8, 6, 3, padding="same")),
    "Conv3d": _volumes(lambda: nn.Conv3d(8, 6, 2)),
    "Conv3d valid": _volumes(lambda: nn.Conv3d(8, 6, 2, padding="valid")),
    "Conv2d circular": _images(lambda: nn.Conv2d(8, 6, 3, padding=1, padding_mode="circular")),
    "Conv2d reflect": _images(lambda: nn.Conv2d(8, 6, 3, padding=1, padding_mode="reflect")),
    "Conv2d replicate": _images(lambda: nn.Conv2d(8, 6, 3, padding=1, padding_mode="replicate")),
    "LazyConv2d": _images(lambda: nn.LazyConv2d(6, 3)),
    "ConvTranspose1d": _lines(lambda: nn.ConvTranspose1d(8, 6, 3, stride=2)),
    "ConvTranspose2d": _images(lambda: nn.ConvTranspose2d(8, 6, 3, output_padding=0)),
    "ConvTranspose2d grouped": _images(lambda: nn.ConvTranspose2d(8, 6, 3, groups=2)),
    "ConvTranspose2d depthwise": _images(lambda: nn.ConvTranspose2d(8, 8, 3, groups=8)),
    "ConvTranspose3d": _volumes(lambda: nn.ConvTranspose3d(8, 6, 2)),
    # linear layers
    "Linear": _tokens(lambda: nn.Linear(8, 6, bias=False)),
    "LazyLinear": _tokens(lambda: nn.LazyLinear(6)),
    "Bilinear": Layer(
        Tokens, _calls(lambda f, t: f(t, t.roll(1, 1)), lambda: nn.Bilinear(8, 8, 5))
    ),
    "Bilinear one output": Layer(
        Tokens,
        _calls(
            lambda f, g, t: g(t) * f(t, t.roll(1, 1)),
            lambda: nn.Bilinear(8, 8, 1),
            lambda: nn.Linear(8, 6),
        ),
        fixed=("layer.layers.0.bias",),
        mixes=True,
    ),
    "filled": _images(lambda: Call(lambda t: t + t.new_full(t.shape, 0.5))),
    "Identity": _tokens(nn.Identity),
    # tables
    "Embedding": Layer(Numbers, lambda: nn.Embedding(10, 6, padding_idx=0)),
    "Embedding max_norm": Layer(Numbers, lambda: nn.Embedding(10, 6, max_norm=1.0), mixes=True),
    "EmbeddingBag mean": Layer(
        Numbers,
        _calls(
            lambda f, x: f(x[:, :3]), lambda: nn.EmbeddingBag(10, 6, mode="mean", padding_idx=2)
        ),
    ),
    "EmbeddingBag max": Layer(
        Numbers, _calls(lambda f, x: f(x[:, :3]), lambda: nn.EmbeddingBag(10, 6, mode="max"))
    ),
    "EmbeddingBag offsets": Layer(
        Numbers,
        _calls(
            lambda f, x: f(x.flatten()[:8], torch.tensor([0, 3, 5])),
            lambda: nn.EmbeddingBag(10, 6, mode="sum"),
        ),
    ),
    "EmbeddingBag weights": Layer(
        Weighted,
        _calls(
            lambda f, x, w: f(x, per_sample_weights=w), lambda: nn.EmbeddingBag(10, 6, mode="sum")
        ),
    ),
    # attention
    "MultiheadAttention": _tokens(
        _calls(lambda f, t: f(t, t, t)[0], lambda: nn.MultiheadAttention(8, 2, batch_first=True)),
    ),
    "MultiheadAttention no weights": _tokens(
        _calls(
            lambda f, t: f(t, t, t, need_weights=False)[0],
            lambda: nn.MultiheadAttention(8, 2, batch_first=True),
        )
    ),
    "MultiheadAttention seq first": _tokens(
        _calls(lambda f, t: f(t, t, t)[0], lambda: nn.MultiheadAttention(8, 2))
    ),
    "MultiheadAttention weights": _tokens(
        _calls(
            lambda f, t: torch.cat([f(t, t, t)[1], t], -1),
            lambda: nn.MultiheadAttention(8, 2, batch_first=True),
        ),
        mixes=True,
    ),
    "MultiheadAttention kdim": Layer(
        Pair,
        _calls(
            lambda f, g, h, t, s: f(t, g(s), h(s))[0],
            lambda: nn.MultiheadAttention(8, 2, kdim=6, vdim=7, batch_first=True),
            lambda: nn.Linear(8, 6),
            lambda: nn.Linear(8, 7),
        ),
    ),
    "MultiheadAttention bias_kv": _tokens(
        _calls(
            lambda f, t: f(t, t, t, need_weights=False)[0],
            lambda: nn.MultiheadAttention(
                8, 2, batch_first=True, add_bias_kv=True, add_zero_attn=True
            ),
        )
    ),
    "MultiheadAttention bias_kv weights": _tokens(
        _calls(
            lambda f, t: f(t, t, t)[0],
            lambda: nn.MultiheadAttention(
                8, 2, batch_first=True, add_bias_kv=True, add_zero_attn=True
            ),
        )
    ),
    "MultiheadAttention mask": _tokens(
        _calls(
            lambda f, t: f(t, t, t, attn_mask=torch.ones(5, 5).triu(1).bool(), need_weights=False)[
                0
            ],
            lambda: nn.MultiheadAttention(8, 2, batch_first=True),
        )
    ),
    "MultiheadAttention causal": _tokens(
        _calls(
            lambda f, t: f(
                t,
                t,
                t,
                attn_mask=nn.Transformer.generate_square_subsequent_mask(5, dtype=t.dtype),
                is_causal=True,
                need_weights=False,
            )[0],
            lambda: nn.MultiheadAttention(8, 2, batch_first=True),
        )
    ),
    "MultiheadAttention padding": _tokens(
        _calls(
            lambda f, t: f(t, t, t, key_padding_mask=(torch.arange(5) > 3).expand(t.shape[0], 5))[
                0
            ],
            lambda: nn.MultiheadAttention(8, 2, batch_first=True),
        )
    ),
    "TransformerEncoderLayer": _tokens(
        lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), mixes=True
    ),
    "TransformerEncoderLayer norm first": _tokens(
        lambda: nn.TransformerEncoderLayer(
            8, 2, 16, batch_first=True, norm_first=True, activation="gelu"
        ),
        mixes=True,
    ),
    "TransformerEncoder": _tokens(
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, nn.LayerNorm(8)
        ),
        mixes=True,
    ),
    "TransformerDecoderLayer": Layer(
        Pair, lambda: nn.TransformerDecoderLayer(8, 2, 16, batch_first=True), mixes=True
    ),
    "TransformerDecoderLayer norm first": Layer(
        Pair,
        lambda: nn.TransformerDecoderLayer(8, 2, 16, batch_first=True, norm_first=True),
        mixes=True,
    ),
    "TransformerDecoder": Layer(
        Pair,
        lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16, batch_first=True), 2),
        mixes=True,
    ),
    "Transformer": Layer(
        Pair, lambda: nn.Transformer(8, 2, 1, 1, 16, batch_first=True), mixes=True
    ),
    # recurrent layers
    "LSTM": _tokens(
        _calls(lambda f, t: f(t)[0], lambda: nn.LSTM(8, 6, batch_first=True)),
        free=[(f"layer.layers.0.{tensor}", 0) for tensor in _LSTM],
    ),
    "LSTM deep": _tokens(
        _calls(
            lambda f, t: f(t)[0],
            lambda: nn.LSTM(8, 6, 2, batch_first=True, bidirectional=True, dropout=0.1),
        )
    ),
    "LSTM projected": _tokens(
        _calls(
            lambda f, t: f(t)[0],
            lambda: nn.LSTM(8, 6, 2, batch_first=True, bidirectional=True, proj_size=3, bias=False),
        )
    ),
    "LSTM states": _tokens(
        _calls(
            lambda f, t: torch.cat(f(t)[1], -1).transpose(0, 1).flatten(1),
            lambda: nn.LSTM(8, 6, 2, batch_first=True, bidirectional=True),
        )
    ),
    "LSTM last state": _tokens(
        _calls(lambda f, t: f(t)[1][0][-1], lambda: nn.LSTM(8, 6, 2, batch_first=True))
    ),
    # Nothing to permute but what comes in.
    "LSTM of one unit": _tokens(
        _calls(
            lambda f, t: f(t)[0],
            lambda: nn.LSTM(8, 1, 2, batch_first=True, bidirectional=True),
        ),
        fixed=("head.weight", *_ONE_UNIT),
        mixes=True,
    ),
    "LSTM seq2seq": Layer(
        Pair,
        _calls(
            lambda f, g, t, s: g(s, f(t)[1])[0],
            lambda: nn.LSTM(8, 6, batch_first=True),
            lambda: nn.LSTM(8, 6, batch_first=True),
        ),
    ),
    "GRU seq2seq": Layer(
        Pair,
        _calls(
            lambda f, g, t, s: g(s, f(t)[1])[0],
            lambda: nn.GRU(8, 6, 2, batch_first=True),
            lambda: nn.GRU(8, 6, 2, batch_first=True),
        ),
    ),
    "LSTM residual": _tokens(
        _calls(lambda f, t: t + f(t)[0], lambda: nn.LSTM(8, 8, batch_first=True))
    ),
    "LSTM twice": _tokens(
        _calls(lambda f, t: f(f(t)[0])[0], lambda: nn.LSTM(8, 8, batch_first=True))
    ),
    "LSTM seq first": _tokens(
        _calls(lambda f, t: f(t.transpose(0, 1))[0].transpose(0, 1), lambda: nn.LSTM(8, 6))
    ),
    "LSTM start": _tokens(
        _calls(
            lambda f, g, h, t: f(t, (g(t.mean(1))[None], h(t.mean(1))[None]))[0],
            lambda: nn.LSTM(8, 6, batch_first=True),
            lambda: nn.Linear(8, 6),
            lambda: nn.Linear(8, 6),
        )
    ),
    "GRU": _tokens(_calls(lambda f, t: f(t)[0], lambda: nn.GRU(8, 6, 2, batch_first=True))),
    "GRU bidirectional": _tokens(
        _calls(lambda f, t: f(t)[0], lambda: nn.GRU(8, 6, 2, batch_first=True, bidirectional=True))
    ),
    "RNN tanh": _tokens(_calls(lambda f, t: f(t)[0], lambda: nn.RNN(8, 6, 2, batch_first=True))),
    "RNN relu": _tokens(
        _calls(
            lambda f, t: f(t)[0],
            lambda: nn.RNN(8, 6, batch_first=True, nonlinearity="relu", bidirectional=True),
        )
    ),
    "LSTMCell": _tokens(_calls(lambda f, t: _unroll(f, t, 2), lambda: nn.LSTMCell(8, 6))),
    "GRUCell": _tokens(_calls(lambda f, t: _unroll(f, t, 1), lambda: nn.GRUCell(8, 6))),
    "RNNCell": _tokens(_calls(lambda f, t: _unroll(f, t, 1), lambda: nn.RNNCell(8, 6))),
    "learned start": _tokens(lambda: LearnedStart()),
    # normalisation
    "BatchNorm1d": _lines(lambda: nn.BatchNorm1d(8)),
    "BatchNorm2d": _images(lambda: nn.BatchNorm2d(8)),
    "BatchNorm2d plain": _images(lambda: nn.BatchNorm2d(8, affine=False)),
    "BatchNorm2d batch statistics": _images(lambda: nn.BatchNorm2d(8, track_running_stats=False)),
    "BatchNorm3d": _volumes(lambda: nn.BatchNorm3d(8)),
    "SyncBatchNorm": _images(lambda: nn.SyncBatchNorm(8)),
    "GroupNorm": _images(lambda: nn.GroupNorm(4, 8)),
    "GroupNorm plain": _images(lambda: nn.GroupNorm(8, 8, affine=False)),
    "GroupNorm one group": _images(lambda: nn.GroupNorm(1, 8), mixes=True),
    "InstanceNorm1d": _lines(lambda: nn.InstanceNorm1d(8)),
    "InstanceNorm2d": _images(lambda: nn.InstanceNorm2d(8, affine=True, track_running_stats=True)),
    "InstanceNorm3d": _volumes(lambda: nn.InstanceNorm3d(8, affine=True)),
    "LayerNorm": _tokens(lambda: nn.LayerNorm(8), mixes=True),
    "LayerNorm images": _images(lambda: nn.LayerNorm((8, 6, 6)), mixes=True),
    "LayerNorm pixels": _images(
        lambda: nn.LayerNorm((6, 6)), fixed=("layer.weight", "layer.bias"), mixes=True
    ),
    "RMSNorm": _tokens(lambda: nn.RMSNorm(8), mixes=True),
    # activations
    **{kind.__name__: _images(kind) for kind in ACTIVATIONS},
    "PReLU": _images(nn.PReLU, fixed=("layer.weight",), mixes=True),
    "PReLU channels": _images(lambda: nn.PReLU(8)),
    "Threshold": _images(lambda: nn.Threshold(0.1, 0.2)),
    "Threshold in place": _images(
        lambda: nn.Sequential(
            nn.Identity(), Call(lambda f, t: f(t * 2), nn.Threshold(0.1, 0.2, inplace=True))
        )
    ),
    "GLU": _images(lambda: nn.GLU(1)),
    "Softmax": _images(lambda: nn.Softmax(1), mixes=True),
    "Softmin": _images(lambda: nn.Softmin(1), mixes=True),
    "LogSoftmax": _images(lambda: nn.LogSoftmax(1), mixes=True),
    "Softmax2d": _images(nn.Softmax2d, mixes=True),
    "Softmax pixels": _images(lambda: nn.Softmax(-1)),
    # dropout
    "Dropout": _images(nn.Dropout),
    "Dropout1d": _lines(nn.Dropout1d),
    "Dropout2d": _images(nn.Dropout2d),
    "Dropout3d": _volumes(nn.Dropout3d),
    "AlphaDropout": _images(nn.AlphaDropout),
    "FeatureAlphaDropout": _images(nn.FeatureAlphaDropout),
    # shapes
    "PixelShuffle": _images(lambda: nn.PixelShuffle(2)),
    "PixelShuffle convolved": _images(
        lambda: nn.Sequential(nn.PixelShuffle(2), nn.Conv2d(2, 6, 3)), free=[("first.weight", 0)]
    ),
    "PixelUnshuffle convolved": _images(
        lambda: nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(32, 6, 1)), free=[("first.weight", 0)]
    ),
    "PixelUnshuffle": _images(lambda: nn.PixelUnshuffle(2)),
    "ChannelShuffle": _images(lambda: nn.ChannelShuffle(2)),
    "Flatten": _images(nn.Flatten),
    "Unflatten": _images(lambda: nn.Sequential(nn.Flatten(), nn.Unflatten(1, (8, 36)))),
    "Unfold": _images(lambda: nn.Unfold(3)),
    "Fold": _images(lambda: nn.Sequential(nn.Unfold(3), nn.Fold((6, 6), 3))),
    "Fold channels": _images(
        _calls(lambda f, t: f(t.flatten(2)[:, :, :25]), lambda: nn.Fold((6, 6), 2))
    ),
    **{
        f"Upsample {mode}": _images(lambda mode=mode: nn.Upsample(scale_factor=2, mode=mode))
        for mode in ("nearest", "nearest-exact", "bilinear", "bicubic")
    },
    "Upsample aligned": _images(
        lambda: nn.Upsample(size=(9, 7), mode="bilinear", align_corners=True)
    ),
    "Upsample linear": _lines(lambda: nn.Upsample(scale_factor=2, mode="linear")),
    "Upsample trilinear": _volumes(lambda: nn.Upsample(scale_factor=2, mode="trilinear")),
    "UpsamplingNearest2d": _images(lambda: nn.UpsamplingNearest2d(scale_factor=2)),
    "UpsamplingBilinear2d": _images(lambda: nn.UpsamplingBilinear2d(scale_factor=2)),
    # pools
    "MaxPool1d": _lines(lambda: nn.MaxPool1d(2)),
    "MaxPool2d": _images(lambda: nn.MaxPool2d(3, 2, 1, ceil_mode=True)),
    "MaxPool3d": _volumes(lambda: nn.MaxPool3d((1, 2, 2))),
    "MaxUnpool1d": _lines(
        _calls(
            lambda f, g, t: g(*f(t)),
            lambda: nn.MaxPool1d(2, return_indices=True),
            lambda: nn.MaxUnpool1d(2),
        )
    ),
    "MaxUnpool2d": _images(
        _calls(
            lambda f, g, t: g(*f(t)),
            lambda: nn.MaxPool2d(2, return_indices=True),
            lambda: nn.MaxUnpool2d(2),
        )
    ),
    "MaxUnpool3d": _volumes(
        _calls(
            lambda f, g, t: g(*f(t)),
            lambda: nn.MaxPool3d((2, 1, 2), return_indices=True),
            lambda: nn.MaxUnpool3d((2, 1, 2)),
        )
    ),
    "AvgPool1d": _lines(lambda: nn.AvgPool1d(2)),
    "AvgPool2d": _images(lambda: nn.AvgPool2d(2, padding=1)),
    "AvgPool3d": _volumes(lambda: nn.AvgPool3d((1, 2, 2))),
    "LPPool1d": _lines(lambda: nn.LPPool1d(2, 2)),
    "LPPool2d": _images(lambda: nn.LPPool2d(2, 2)),
    "LPPool3d": _volumes(lambda: nn.LPPool3d(2, (1, 2, 2))),
    "FractionalMaxPool2d samples": _images(
        lambda: nn.FractionalMaxPool2d(
            2,
            output_size=3,
            _random_samples=torch.tensor([0.2, 0.7], dtype=torch.float64).expand(4, 8, 2).clone(),
        )
    ),
    "AdaptiveAvgPool1d": _lines(lambda: nn.AdaptiveAvgPool1d(2)),
    "AdaptiveAvgPool2d": _images(lambda: nn.AdaptiveAvgPool2d((2, None))),
    "AdaptiveAvgPool3d": _volumes(lambda: nn.AdaptiveAvgPool3d(1)),
    "AdaptiveMaxPool1d": _lines(lambda: nn.AdaptiveMaxPool1d(2)),
    "AdaptiveMaxPool2d": _images(lambda: nn.AdaptiveMaxPool2d((2, 3))),
    "AdaptiveMaxPool3d": _volumes(lambda: nn.AdaptiveMaxPool3d(1)),
    # pads
    **{
        f"{kind}Pad1d": _lines(lambda kind=kind: getattr(nn, f"{kind}Pad1d")(1))
        for kind in ("Zero", "Reflection", "Replication", "Circular")
    },
    **{
        f"{kind}Pad2d": _images(lambda kind=kind: getattr(nn, f"{kind}Pad2d")((1, 2, 0, 1)))
        for kind in ("Zero", "Reflection", "Replication", "Circular")
    },
    **{
        f"{kind}Pad3d": _volumes(lambda kind=kind: getattr(nn, f"{kind}Pad3d")(1))
        for kind in ("Zero", "Reflection", "Replication", "Circular")
    },
    "ConstantPad2d": _images(lambda: nn.ConstantPad2d(1, 0.5)),
    # distances
    "CosineSimilarity": _images(
        _calls(lambda f, t: f(t, t.roll(1, 2)), lambda: nn.CosineSimilarity(1)),
        mixes=True,
        fixed=("head.weight",),
    ),
    "CosineSimilarity pixels": _images(
        _calls(lambda f, t: f(t, t.roll(1, 2)), lambda: nn.CosineSimilarity(2))
    ),
    "PairwiseDistance": _tokens(
        _calls(lambda f, t: f(t, t.roll(1, 1)), nn.PairwiseDistance),
        mixes=True,
        fixed=("head.weight",),
    ),
    # weights made of parameters
    "weight_norm": _images(lambda: parametrizations.weight_norm(nn.Conv2d(8, 6, 3))),
    "weight_norm columns": _tokens(lambda: parametrizations.weight_norm(nn.Linear(8, 6), dim=1)),
    "weight_norm transposed": _images(
        lambda: parametrizations.weight_norm(nn.ConvTranspose2d(8, 6, 3), dim=1)
    ),
    "weight_norm whole": _tokens(
        lambda: parametrizations.weight_norm(nn.Linear(8, 6), dim=None),
        mixes=True,
        fixed=("layer.parametrizations.weight.original0",),
    ),
    "weight_norm hooks": _images(lambda: nn.utils.weight_norm(nn.Conv2d(8, 6, 3))),
    "weight_norm grouped": _images(
        lambda: parametrizations.weight_norm(nn.Conv2d(8, 6, 3, groups=2))
    ),
    "spectral_norm": _images(
        lambda: parametrizations.spectral_norm(nn.Conv2d(8, 6, 3)),
        free=[("layer.parametrizations.weight.0._u", 0), ("layer.parametrizations.weight.0._v", 0)],
        mixes=True,
    ),
    "spectral_norm transposed": _images(
        lambda: parametrizations.spectral_norm(nn.ConvTranspose2d(8, 6, 3)), mixes=True
    ),
    "spectral_norm linear": _tokens(
        lambda: parametrizations.spectral_norm(nn.Linear(8, 6)), mixes=True
    ),
    "spectral_norm hooks": _images(lambda: nn.utils.spectral_norm(nn.Conv2d(8, 6, 3)), mixes=True),
    "orthogonal": _tokens(
        lambda: parametrizations.orthogonal(nn.Linear(8, 6)),
        fixed=("layer.bias", "head.weight", "layer.parametrizations.weight.original"),
        mixes=True,
    ),
    "orthogonal cayley": _tokens(
        lambda: parametrizations.orthogonal(nn.Linear(8, 8), orthogonal_map="cayley"),
        fixed=("first.weight", "first.bias", "layer.parametrizations.weight.original"),
        mixes=True,
    ),
    "standardised": _images(lambda: _parametrized(nn.Conv2d(8, 6, 3), Standardised()), mixes=True),
    "symmetric": _tokens(lambda: _parametrized(nn.Linear(8, 8), Symmetric())),
    "positive": _tokens(lambda: _parametrized(nn.Linear(8, 6), Positive()), mixes=True),
    "low rank": _tokens(lambda: LowRank()),
}

#: Layers that keep everything in its place, and why.
FROZEN = {
    # A window over neighbouring channels.
    "LocalResponseNorm": (_images(lambda: nn.LocalResponseNorm(3)), "neighbours matter"),
    "CrossMapLRN2d": (_images(lambda: nn.CrossMapLRN2d(3)), "has no rule"),
    # Its windows are drawn anew for every channel at every call: the network is no function.
    "FractionalMaxPool2d": (
        _images(lambda: nn.FractionalMaxPool2d(2, output_size=3)),
        "meets content without labels",
    ),
}
