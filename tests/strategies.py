"""Random networks: a recipe is a short list of blocks, which hypothesis draws and shrinks.

A network is a stem, blocks on images `[b, c, h, w]`, optionally blocks on tokens `[b, t, c]`,
blocks on vectors `[b, c]` and a linear head. A block takes whatever width arrives, so that
neighbours couple; one that needs a divisible width puts a layer in front.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn

from fxfuse.graph.capture import Program
from tests.models import excite
from tests.nets import programs

CLASSES = 3
OUTPUTS = ("one", "tuple", "dict")
_SIDE = 4
_TOKENS = _SIDE * _SIDE


@dataclass(frozen=True)
class Block:
    """What one block is made from.

    Attributes:
        kind: A key of `BLOCKS`.
        width: Neurons of a new layer, or of one of its parts, heads or groups.
        parts: Heads, groups, how many pieces a split makes.
        flag: A second version of the kind.
    """

    kind: str
    width: int = 2
    parts: int = 2
    flag: bool = False


@dataclass(frozen=True)
class Recipe:
    """A network in words.

    `bridge` leads away from images, `end` away from tokens; `output` says how many outputs there
    are and in what they come.
    """

    stem: int = 4
    images: tuple[Block, ...] = ()
    bridge: str = "mean"
    tokens: tuple[Block, ...] = ()
    end: str = "mean"
    vectors: tuple[Block, ...] = ()
    output: str = "one"


@dataclass(frozen=True)
class Space:
    """What activations look like, and which layers they pass."""

    name: str
    dim: int
    layer: Callable[[int, int], nn.Module]
    norm: Callable[[int], nn.Module]


def _conv(i: int, o: int, size: int = 3, **options: Any) -> nn.Module:
    return nn.Conv2d(i, o, size, padding=size // 2, **options)


IMAGE = Space("image", 1, _conv, nn.BatchNorm2d)
TOKENS = Space("tokens", 2, nn.Linear, nn.LayerNorm)
VECTOR = Space("vector", 1, nn.Linear, nn.BatchNorm1d)
SPACES = (IMAGE, TOKENS, VECTOR)


def _act(x: torch.Tensor) -> torch.Tensor:
    # Not relu: a network two neurons wide would often be dead.
    return F.leaky_relu(x, 0.3)


class Part(nn.Module):
    """Layers, parameters and a function of them: one block of width `out`."""

    def __init__(self, out: int, function: Callable[..., torch.Tensor], **own: Any) -> None:
        super().__init__()
        self.out = out
        self.function = function
        for name, value in own.items():
            setattr(self, name, nn.Parameter(value) if isinstance(value, torch.Tensor) else value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self, x)


Builder = Callable[[Space, int, Block], Part]


@dataclass(frozen=True)
class Kind:
    """A kind of block.

    Attributes:
        build: From the space, the width that arrives and the block.
        spaces: Where it can stand.
        plain: No operator of it mixes members: wide equals ensemble exactly.
    """

    build: Builder
    spaces: tuple[Space, ...]
    plain: bool


BLOCKS: dict[str, Kind] = {}


def _block(*spaces: Space, plain: bool = True) -> Callable[[Builder], Builder]:
    def register(build: Builder) -> Builder:
        BLOCKS[build.__name__.strip("_")] = Kind(build, spaces, plain)
        return build

    return register


def _fit(space: Space, i: int, parts: int) -> tuple[nn.Module, int]:
    """Nothing when the width divides, else a layer to a width that does."""
    if i % parts == 0 and i // parts >= 2:
        return nn.Identity(), i
    out = parts * max(2, i // parts)
    return space.layer(i, out), out


# --- anywhere -----------------------------------------------------------------------------------


@_block(*SPACES)
def _layer(space: Space, i: int, b: Block) -> Part:
    return Part(b.width, lambda m, x: _act(m.layer(x)), layer=space.layer(i, b.width))


@_block(*SPACES, plain=False)
def _norm(space: Space, i: int, b: Block) -> Part:
    """A layer with BatchNorm; LayerNorm for tokens."""
    # The norm of two neurons is a sign.
    out = max(b.width, 3)
    layer, norm = space.layer(i, out), space.norm(out)
    return Part(out, lambda m, x: _act(m.norm(m.layer(x))), layer=layer, norm=norm)


@_block(*SPACES)
def _residual(space: Space, i: int, b: Block) -> Part:
    def forward(m: Part, x: torch.Tensor) -> torch.Tensor:
        y = x + m.second(_act(m.first(x)))
        return _act(y) if b.flag else y

    return Part(i, forward, first=space.layer(i, b.width), second=space.layer(b.width, i))


@_block(*SPACES)
def _downsample(space: Space, i: int, b: Block) -> Part:
    """A residual block whose shortcut is a layer; on images with a stride."""
    first, second, short = (
        space.layer(i, b.width),
        space.layer(b.width, b.width),
        space.layer(i, b.width),
    )
    if space is IMAGE and b.flag:
        first, short = _conv(i, b.width, stride=2), _conv(i, b.width, 1, stride=2)
    return Part(
        b.width,
        lambda m, x: _act(m.short(x) + m.second(_act(m.first(x)))),
        first=first,
        second=second,
        short=short,
    )


@_block(*SPACES)
def _dense(space: Space, i: int, b: Block) -> Part:
    def forward(m: Part, x: torch.Tensor) -> torch.Tensor:
        y = _act(m.layer(x))
        return torch.cat([y, x] if b.flag else [x, y], space.dim)

    return Part(i + b.width, forward, layer=space.layer(i, b.width))


@_block(*SPACES)
def _gate(space: Space, i: int, b: Block) -> Part:
    def forward(m: Part, x: torch.Tensor) -> torch.Tensor:
        left, right = m.layer(x).chunk(2, space.dim)
        return right * F.silu(left) if b.flag else left * right.sigmoid()

    return Part(b.width, forward, layer=space.layer(i, 2 * b.width))


@_block(*SPACES)
def _halves(space: Space, i: int, b: Block) -> Part:
    """Both halves end in one tensor, but on different ways."""

    def forward(m: Part, x: torch.Tensor) -> torch.Tensor:
        left, right = (m.layer(x) if b.flag else m.fit(x)).chunk(2, space.dim)
        return torch.cat([_act(left), right], space.dim)

    if b.flag:
        return Part(2 * b.width, forward, layer=space.layer(i, 2 * b.width))
    fit, width = _fit(space, i, 2)
    return Part(width, forward, fit=fit)


@_block(*SPACES)
def _branches(space: Space, i: int, b: Block) -> Part:
    """One half passes a layer, the other none; the halves may change places."""
    fit, width = _fit(space, i, 2)
    half = width // 2

    def forward(m: Part, x: torch.Tensor) -> torch.Tensor:
        left, right = m.fit(x).split(half, space.dim)
        right = _act(m.layer(right))
        return torch.cat([right, left] if b.flag else [left, right], space.dim)

    return Part(width, forward, fit=fit, layer=space.layer(half, half))


@_block(*SPACES)
def _uneven(space: Space, i: int, b: Block) -> Part:
    """Split into pieces of different sizes; one of them is dropped, or gates nothing."""
    total = 2 * b.width + 1

    def forward(m: Part, x: torch.Tensor) -> torch.Tensor:
        left, right = m.layer(x).split([b.width, b.width + 1], space.dim)
        return torch.cat([right.tanh(), left], space.dim) if b.flag else right.tanh()

    out = total if b.flag else b.width + 1
    return Part(out, forward, layer=space.layer(i, total))


@_block(*SPACES)
def _shuffle(space: Space, i: int, b: Block) -> Part:
    """Channel shuffle: pieces are interleaved."""
    fit, width = _fit(space, i, b.parts)

    def forward(m: Part, x: torch.Tensor) -> torch.Tensor:
        y = m.fit(x).unflatten(space.dim, (b.parts, width // b.parts))
        return y.transpose(space.dim, space.dim + 1).flatten(space.dim, space.dim + 1)

    return Part(width, forward, fit=fit)


@_block(*SPACES)
def _interleave(space: Space, i: int, b: Block) -> Part:
    """Two branches, channel by channel."""

    def forward(m: Part, x: torch.Tensor) -> torch.Tensor:
        both = torch.stack([_act(m.first(x)), m.second(x)], space.dim + int(b.flag))
        return both.flatten(space.dim, space.dim + 1)

    return Part(2 * b.width, forward, first=space.layer(i, b.width), second=space.layer(i, b.width))


@_block(*SPACES)
def _tied(space: Space, i: int, b: Block) -> Part:
    """One layer, used twice."""

    def forward(m: Part, x: torch.Tensor) -> torch.Tensor:
        y = m.layer(_act(m.layer(x)))
        return x + y if b.flag else _act(y)

    return Part(i, forward, layer=space.layer(i, i))


@_block(*SPACES)
def _tied_branches(space: Space, i: int, b: Block) -> Part:
    """One layer on two halves of the activation: its input neurons are those of both."""
    fit, width = _fit(space, i, 2)

    def forward(m: Part, x: torch.Tensor) -> torch.Tensor:
        left, right = m.fit(x).chunk(2, space.dim)
        left, right = _act(m.layer(left)), m.layer(right)
        return torch.cat([left, right], space.dim) if b.flag else left + right

    out = (2 if b.flag else 1) * b.width
    return Part(out, forward, fit=fit, layer=space.layer(width // 2, b.width))


@_block(*SPACES)
def _scale(space: Space, i: int, b: Block) -> Part:
    """A factor and a shift per neuron (layer scale)."""
    shape = (i, 1, 1) if space is IMAGE else (i,)
    return Part(
        i,
        lambda m, x: x * m.factor + m.shift,
        factor=torch.rand(shape) + 0.5,
        shift=torch.randn(shape) * 0.1,
    )


@_block(*SPACES, plain=False)
def _temperature(space: Space, i: int, b: Block) -> Part:
    """A scalar that all neurons share."""
    return Part(i, lambda m, x: (x * m.factor).tanh(), factor=torch.rand(1) + 0.5)


@_block(*SPACES)
def _layer_scale(space: Space, i: int, b: Block) -> Part:
    """A residual branch with a factor per neuron; the factor is stored as [c] or as [1, c, ...]."""
    shape = [1, i, 1, 1] if space is IMAGE else [1, i] if b.flag else [i]

    def forward(m: Part, x: torch.Tensor) -> torch.Tensor:
        return x + m.gamma * _act(m.layer(x))

    return Part(i, forward, layer=space.layer(i, i), gamma=torch.rand(shape) + 0.5)


@_block(*SPACES)
def _glu(space: Space, i: int, b: Block) -> Part:
    return Part(
        b.width,
        lambda m, x: F.glu(m.layer(x), space.dim),
        layer=space.layer(i, 2 * b.width),
    )


@_block(*SPACES)
def _resplit(space: Space, i: int, b: Block) -> Part:
    """Concatenation, then split at other borders."""
    sizes = [2, 2 * b.width - 1]

    def forward(m: Part, x: torch.Tensor) -> torch.Tensor:
        both = torch.cat([m.first(x), m.second(x)], space.dim)
        left, right = both.split(sizes[:: -1 if b.flag else 1], space.dim)
        return torch.cat([right, left.tanh()], space.dim)

    return Part(
        2 * b.width + 1,
        forward,
        first=space.layer(i, b.width),
        second=space.layer(i, b.width + 1),
    )


@_block(*SPACES)
def _drop(space: Space, i: int, b: Block) -> Part:
    """A third of a split is read by nobody."""

    def forward(m: Part, x: torch.Tensor) -> torch.Tensor:
        first, second, third = m.layer(x).chunk(3, space.dim)
        return first.tanh() + third if b.flag else second * third

    return Part(b.width, forward, layer=space.layer(i, 3 * b.width))


@_block(*SPACES)
def _roll(space: Space, i: int, b: Block) -> Part:
    """Channels roll or flip; in a residual all of them become one unit, or pairs."""

    def forward(m: Part, x: torch.Tensor) -> torch.Tensor:
        y = x.roll(1, space.dim) if b.parts == 2 else x.flip(space.dim)
        return x + _act(y) if b.flag else _act(m.layer(y))

    out = i if b.flag else b.width
    return Part(out, forward, layer=nn.Identity() if b.flag else space.layer(i, b.width))


@_block(*SPACES)
def _repeat(space: Space, i: int, b: Block) -> Part:
    """Every channel twice, next to each other or one time after the other."""

    def forward(m: Part, x: torch.Tensor) -> torch.Tensor:
        if b.flag:
            return _act(x.repeat_interleave(2, space.dim)) * m.factor
        times = [1] * x.dim()
        times[space.dim] = 2
        return (x.repeat(times) if b.parts == 2 else x.tile(times)) * m.factor

    shape = [2 * i, 1, 1] if space is IMAGE else [2 * i]
    return Part(2 * i, forward, factor=torch.rand(shape) + 0.5)


@_block(*SPACES)
def _every_second(space: Space, i: int, b: Block) -> Part:
    """`x[:, ::2]`, and the others."""
    fit, width = _fit(space, i, 4)
    even, odd = ([slice(None)] * space.dim + [slice(start, None, 2)] for start in (0, 1))

    def forward(m: Part, x: torch.Tensor) -> torch.Tensor:
        x = m.fit(x)
        if b.parts == 2:
            return x[tuple(even)]
        y = torch.cat([_act(x[tuple(odd)]), x[tuple(even)]], space.dim)
        return x + y if b.flag else y

    return Part(width if b.parts > 2 else width // 2, forward, fit=fit)


@_block(*SPACES)
def _slices_of_slices(space: Space, i: int, b: Block) -> Part:
    def forward(m: Part, x: torch.Tensor) -> torch.Tensor:
        y = m.layer(x).narrow(space.dim, 1, b.width + 1)
        return y.narrow(space.dim, 0, b.width) * y.narrow(space.dim, 1, b.width)

    return Part(b.width, forward, layer=space.layer(i, b.width + 3))


@_block(*SPACES)
def _views_of_views(space: Space, i: int, b: Block) -> Part:
    """Channels are taken apart twice, moved, and put together again."""
    out = 2 * b.parts * b.width

    def forward(m: Part, x: torch.Tensor) -> torch.Tensor:
        y = m.layer(x).unflatten(space.dim, (2, b.parts * b.width))
        y = y.unflatten(space.dim + 1, (b.parts, b.width))
        y = y.transpose(space.dim, space.dim + 2) if b.flag else y.movedim(space.dim, space.dim + 1)
        return _act(y.flatten(space.dim, space.dim + 1).flatten(space.dim, space.dim + 1))

    return Part(out, forward, layer=space.layer(i, out))


@_block(*SPACES)
def _in_place(space: Space, i: int, b: Block) -> Part:
    """Operators that write to their operand."""
    shape = [i, 1, 1] if space is IMAGE else [i]

    def forward(m: Part, x: torch.Tensor) -> torch.Tensor:
        y = m.layer(x)
        if b.flag:
            y.add_(x)
        F.leaky_relu(y, 0.3, inplace=True)
        return y.add_(m.factor) if b.parts > 2 else y.mul_(m.factor)

    return Part(i, forward, layer=space.layer(i, i), factor=torch.rand(shape) + 0.5)


@_block(*SPACES)
def _write_slice(space: Space, i: int, b: Block) -> Part:
    """A part of the channels is overwritten, or changed in place."""
    out = 2 * b.width + 1

    def forward(m: Part, x: torch.Tensor) -> torch.Tensor:
        y = m.layer(x).clone()
        part = y.narrow(space.dim, 1 if b.flag else 0, b.width)
        if b.parts == 2:
            part.copy_(m.other(x))
        else:
            part.mul_(2.0).tanh_()
        return _act(y)

    other = space.layer(i, b.width) if b.parts == 2 else nn.Identity()
    return Part(out, forward, layer=space.layer(i, out), other=other)


# A channel that is the same in all members stays so: what is added to it later is averaged.
@_block(*SPACES, plain=False)
def _write_constant(space: Space, i: int, b: Block) -> Part:
    """A channel is overwritten by a constant."""

    def forward(m: Part, x: torch.Tensor) -> torch.Tensor:
        y = m.layer(x).clone()
        y.select(space.dim, b.width if b.flag else 0).fill_(0.5)
        return _act(y)

    return Part(b.width + 1, forward, layer=space.layer(i, b.width + 1))


@_block(*SPACES)
def _moving_average(space: Space, i: int, b: Block) -> Part:
    """A network that changes in `forward`: the mean of its neurons, and a counter."""

    def forward(m: Part, x: torch.Tensor) -> torch.Tensor:
        y = _act(m.layer(x))
        at = [d for d in range(y.dim()) if d != (space.dim if space is not TOKENS else 2)]
        if b.flag:
            y = y - m.mean.reshape([-1 if d not in at else 1 for d in range(y.dim())])
        m.mean.mul_(0.9).add_(y.detach().mean(at), alpha=0.1)
        m.runs += 1
        return y

    part = Part(b.width, forward, layer=space.layer(i, b.width))
    part.register_buffer("mean", torch.zeros(b.width))
    part.register_buffer("runs", torch.zeros((), dtype=torch.long))
    return part


@_block(*SPACES)
def _picked_parameter(space: Space, i: int, b: Block) -> Part:
    """Rows of a parameter, picked by their index, scale and shift."""
    shape = [3, i, 1, 1] if space is IMAGE else [3, i]

    def forward(m: Part, x: torch.Tensor) -> torch.Tensor:
        if b.flag:
            factor, shift = m.table[[2, 0]]
        else:
            factor, shift = m.table[0], m.table[2]
        return (x * factor + shift).tanh()

    return Part(i, forward, table=torch.rand(shape) + 0.5)


# --- images and vectors -------------------------------------------------------------------------


@_block(IMAGE, VECTOR)
def _prelu(space: Space, i: int, b: Block) -> Part:
    return Part(i, lambda m, x: m.act(x), act=nn.PReLU(i))


# --- tokens and vectors -------------------------------------------------------------------------


@_block(TOKENS, VECTOR)
def _raw_weight(space: Space, i: int, b: Block) -> Part:
    """A parameter as the weight: `x @ W`, or by einsum."""

    def forward(m: Part, x: torch.Tensor) -> torch.Tensor:
        if b.flag:
            letters = "btc,cd->btd" if space is TOKENS else "bc,cd->bd"
            return _act(torch.einsum(letters, x, m.matrix) + m.shift)
        return _act(x @ m.matrix + m.shift)

    return Part(b.width, forward, matrix=torch.randn(i, b.width), shift=torch.randn(b.width) * 0.1)


@_block(TOKENS, VECTOR)
def _tied_transposed(space: Space, i: int, b: Block) -> Part:
    """One matrix leads there, and transposed leads back."""

    def forward(m: Part, x: torch.Tensor) -> torch.Tensor:
        y = _act(m.layer(x))
        y = y @ m.layer.weight if b.flag else F.linear(y, m.layer.weight.T)
        return x + y if b.parts > 2 else y

    return Part(i, forward, layer=nn.Linear(i, b.width))


# --- images -------------------------------------------------------------------------------------


@_block(IMAGE)
def _grouped(space: Space, i: int, b: Block) -> Part:
    fit, width = _fit(space, i, b.parts)
    out = b.parts * b.width
    layer = _conv(width, out, groups=b.parts, bias=b.flag)
    return Part(out, lambda m, x: _act(m.layer(m.fit(x))), fit=fit, layer=layer)


@_block(IMAGE)
def _depthwise(space: Space, i: int, b: Block) -> Part:
    out = 2 * i if b.flag else i
    layer = _conv(i, out, groups=i)
    return Part(out, lambda m, x: m.norm(m.layer(x)), layer=layer, norm=nn.BatchNorm2d(out))


@_block(IMAGE)
def _excite(space: Space, i: int, b: Block) -> Part:
    """Squeeze and excite."""

    def forward(m: Part, x: torch.Tensor) -> torch.Tensor:
        pooled = x.mean((2, 3), keepdim=True) if b.flag else F.adaptive_avg_pool2d(x, 1)
        return x * m.second(_act(m.first(pooled))).sigmoid()

    return Part(i, forward, first=_conv(i, b.width, 1), second=_conv(b.width, i, 1))


# Behind a block that couples channels of several groups, it mixes.
@_block(IMAGE, plain=False)
def _group_norm(space: Space, i: int, b: Block) -> Part:
    fit, width = _fit(space, i, b.parts)
    return Part(width, lambda m, x: m.norm(m.fit(x)), fit=fit, norm=nn.GroupNorm(b.parts, width))


@_block(IMAGE, plain=False)
def _channels_last(space: Space, i: int, b: Block) -> Part:
    """LayerNorm over the channels, and a linear layer before the way back (ConvNeXt)."""

    def forward(m: Part, x: torch.Tensor) -> torch.Tensor:
        x = m.fit(x)
        y = m.layer(m.norm(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        return x + y if b.flag else y

    width = max(i, 3)
    out = width if b.flag else b.width
    fit = nn.Identity() if i == width else _conv(i, width)
    return Part(out, forward, fit=fit, norm=nn.LayerNorm(width), layer=nn.Linear(width, out))


@_block(IMAGE)
def _padded(space: Space, i: int, b: Block) -> Part:
    """The shortcut gets zeros for its new channels, at the end or on both sides."""
    before = 1 if b.flag else 0
    out = i + before + b.width

    def forward(m: Part, x: torch.Tensor) -> torch.Tensor:
        y, short = _act(m.layer(x)), F.pad(x, (0, 0, 0, 0, before, b.width))
        return y + short if b.parts > 2 else short + y

    return Part(out, forward, layer=_conv(i, out))


@_block(IMAGE)
def _pooled(space: Space, i: int, b: Block) -> Part:
    pool = F.max_pool2d if b.flag else F.avg_pool2d

    def forward(m: Part, x: torch.Tensor) -> torch.Tensor:
        y = pool(x, 3, stride=1, padding=1)
        return torch.cat([x, y], 1) if b.parts > 2 else y

    return Part(2 * i if b.parts > 2 else i, forward)


@_block(IMAGE)
def _transposed(space: Space, i: int, b: Block) -> Part:
    return Part(
        b.width,
        lambda m, x: _act(m.layer(x)),
        layer=nn.ConvTranspose2d(i, b.width, 3, padding=1),
    )


def _even(x: torch.Tensor) -> torch.Tensor:
    return F.interpolate(x, size=_SIDE) if x.shape[-1] % 2 else x


@_block(IMAGE)
def _dilated(space: Space, i: int, b: Block) -> Part:
    """Dilated, strided, or without square kernels."""
    if b.parts == 2:
        layer: nn.Module = nn.Conv2d(i, b.width, 3, padding=2, dilation=2)
    else:
        layer = nn.Conv2d(i, b.width, (1, 3), padding=(0, 1), stride=2 if b.flag else 1)
    return Part(b.width, lambda m, x: _act(m.layer(x)), layer=layer)


@_block(IMAGE)
def _transposed_strided(space: Space, i: int, b: Block) -> Part:
    layer = nn.ConvTranspose2d(i, b.width, 2, stride=2, bias=b.flag)
    return Part(b.width, lambda m, x: F.avg_pool2d(_act(m.layer(x)), 2), layer=layer)


@_block(IMAGE)
def _transposed_grouped(space: Space, i: int, b: Block) -> Part:
    fit, width = _fit(space, i, b.parts)
    out = b.parts * b.width
    layer = nn.ConvTranspose2d(width, out, 3, padding=1, groups=b.parts, bias=b.flag)
    return Part(out, lambda m, x: _act(m.layer(m.fit(x))), fit=fit, layer=layer)


@_block(IMAGE)
def _instance_norm(space: Space, i: int, b: Block) -> Part:
    return Part(
        i,
        # Without the activation, a mean over the pixels would take the norm's own mean.
        lambda m, x: _act(m.norm(_even(x))),
        norm=nn.InstanceNorm2d(i, affine=b.flag, track_running_stats=b.parts > 2),
    )


# Neighbouring channels are pooled: they are in order, so one member keeps them.
@_block(IMAGE, plain=False)
def _local_response(space: Space, i: int, b: Block) -> Part:
    return Part(i, lambda m, x: m.norm(x), norm=nn.LocalResponseNorm(2, alpha=0.5))


# The statistics are taken over the input channels of all members.
@_block(IMAGE, plain=False)
def _standardised(space: Space, i: int, b: Block) -> Part:
    """A weight that is standardised in the graph."""

    def forward(m: Part, x: torch.Tensor) -> torch.Tensor:
        weight = m.weight - m.weight.mean((1, 2, 3), keepdim=True)
        if b.flag:
            weight = weight / (weight.pow(2).mean((1, 2, 3), keepdim=True) + 1e-5).sqrt()
        else:
            weight = m.gain * F.normalize(weight.flatten(1), dim=1).view_as(weight)
        return _act(F.conv2d(x, weight, padding=1))

    return Part(
        b.width,
        forward,
        weight=torch.randn(b.width, i, 3, 3),
        gain=torch.rand(b.width, 1, 1, 1) + 0.5,
    )


@_block(IMAGE)
def _gates(space: Space, i: int, b: Block) -> Part:
    """Squeeze and excite with other gates, and one gate per pixel."""

    def forward(m: Part, x: torch.Tensor) -> torch.Tensor:
        gate = m.second(F.relu6(m.first(x.mean((2, 3), keepdim=True))))
        gate = F.hardsigmoid(gate) if b.flag else 1 + gate.tanh()
        return x * gate.expand_as(x) if b.parts > 2 else x.mul(gate)

    return Part(i, forward, first=_conv(i, b.width, 1), second=_conv(b.width, i, 1))


@_block(IMAGE)
def _pixel_shuffle(space: Space, i: int, b: Block) -> Part:
    def forward(m: Part, x: torch.Tensor) -> torch.Tensor:
        if b.flag:
            return F.pixel_unshuffle(_even(m.layer(x)), 2)
        return F.avg_pool2d(_act(F.pixel_shuffle(m.layer(x), 2)), 2)

    width = b.width if b.flag else 4 * b.width
    return Part(4 * b.width if b.flag else b.width, forward, layer=_conv(i, width))


@_block(IMAGE)
def _windows(space: Space, i: int, b: Block) -> Part:
    """A layer on windows of 2 by 2 pixels, as tokens; windows join the batch, or do not."""

    def forward(m: Part, x: torch.Tensor) -> torch.Tensor:
        x = _even(x)
        batch, channels, side = x.shape[0], x.shape[1], x.shape[2]
        y = x.view(batch, channels, side // 2, 2, x.shape[3] // 2, 2)
        y = y.permute(0, 2, 4, 3, 5, 1)
        shape = y.shape
        y = _act(m.layer(y.reshape(-1, 4, channels) if b.flag else y.flatten(3, 4)))
        y = y.reshape(*shape[:5], -1).permute(0, 5, 1, 3, 2, 4)
        return y.reshape(batch, -1, side, x.shape[3])

    return Part(b.width, forward, layer=nn.Linear(i, b.width))


# --- tokens -------------------------------------------------------------------------------------


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, fused: bool) -> torch.Tensor:
    if fused:
        y = F.scaled_dot_product_attention(q, k, v)
    else:
        y = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1) @ v
    return y.transpose(1, 2).flatten(2)


@_block(TOKENS)
def _attention(space: Space, i: int, b: Block) -> Part:
    """Queries, keys and values from one layer."""
    inner = b.parts * b.width

    def forward(m: Part, x: torch.Tensor) -> torch.Tensor:
        qkv = m.qkv(x).unflatten(-1, (3, b.parts, b.width)).permute(2, 0, 3, 1, 4)
        return x + m.out_layer(_attend(*qkv.unbind(0), fused=b.flag))

    return Part(i, forward, qkv=nn.Linear(i, 3 * inner), out_layer=nn.Linear(inner, i))


@_block(TOKENS)
def _attention_chunks(space: Space, i: int, b: Block) -> Part:
    """Queries, keys and values from one layer, cut before the heads are."""
    inner = b.parts * b.width

    def forward(m: Part, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, _ = x.shape
        parts = (
            y.reshape(batch, tokens, b.parts, b.width).transpose(1, 2)
            for y in m.qkv(x).chunk(3, -1)
        )
        return x + m.out_layer(_attend(*parts, fused=b.flag))

    return Part(i, forward, qkv=nn.Linear(i, 3 * inner), out_layer=nn.Linear(inner, i))


@_block(TOKENS)
def _attention_separate(space: Space, i: int, b: Block) -> Part:
    """Queries, keys and values from layers of their own; values have another width."""
    inner, wide = b.parts * b.width, b.parts * (b.width + 1)

    def forward(m: Part, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (b.parts, -1)).transpose(1, 2) for layer in (m.q, m.k, m.v)
        )
        return x + m.out_layer(_attend(q, k, v, fused=b.flag))

    return Part(
        i,
        forward,
        q=nn.Linear(i, inner),
        k=nn.Linear(i, inner, bias=False),
        v=nn.Linear(i, wide),
        out_layer=nn.Linear(wide, i),
    )


@_block(TOKENS, plain=False)
def _attention_one_head(space: Space, i: int, b: Block) -> Part:
    """No heads: the neurons of query and key are units of their own."""

    def forward(m: Part, x: torch.Tensor) -> torch.Tensor:
        y = _attend(*(layer(x).unsqueeze(1) for layer in (m.q, m.k, m.v)), fused=b.flag)
        return x + m.out_layer(y)

    return Part(
        i,
        forward,
        q=nn.Linear(i, b.width),
        k=nn.Linear(i, b.width),
        v=nn.Linear(i, b.width),
        out_layer=nn.Linear(b.width, i),
    )


@_block(TOKENS)
def _position(space: Space, i: int, b: Block) -> Part:
    """A position table, [t, c] or [1, t, c]."""
    shape = (1, _TOKENS, i) if b.flag else (_TOKENS, i)
    return Part(i, lambda m, x: x + m.table, table=torch.randn(shape) * 0.3)


@_block(TOKENS)
def _class_token(space: Space, i: int, b: Block) -> Part:
    """A class token; it takes the place of the first token, so that their number stays."""

    def forward(m: Part, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([m.token.expand(x.shape[0], -1, -1), x[:, 1:]], 1)

    return Part(i, forward, token=torch.randn(1, 1, i))


@_block(TOKENS, plain=False)
def _pre_norm(space: Space, i: int, b: Block) -> Part:
    """A transformer's MLP."""
    return Part(
        i,
        lambda m, x: x + m.second(F.gelu(m.first(m.norm(x)))),
        norm=nn.LayerNorm(i),
        first=nn.Linear(i, b.width),
        second=nn.Linear(b.width, i),
    )


@_block(TOKENS, plain=False)
def _mix_tokens(space: Space, i: int, b: Block) -> Part:
    """An MLP over the tokens: its hidden neurons are free, the tokens are not."""

    def forward(m: Part, x: torch.Tensor) -> torch.Tensor:
        return x + m.second(_act(m.first(x.transpose(1, 2)))).transpose(1, 2)

    return Part(i, forward, first=nn.Linear(_TOKENS, b.width), second=nn.Linear(b.width, _TOKENS))


@_block(TOKENS)
def _attention_grouped(space: Space, i: int, b: Block) -> Part:
    """Two heads of queries read one head of keys and values."""
    heads, size = b.parts, b.width

    def forward(m: Part, x: torch.Tensor) -> torch.Tensor:
        q = m.q(x).unflatten(-1, (2 * heads, size)).transpose(1, 2)
        k, v = (y(x).unflatten(-1, (heads, size)).transpose(1, 2) for y in (m.k, m.v))
        if b.width == 2:
            y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
            return x + m.out_layer(y.transpose(1, 2).flatten(2))
        if b.width == 3:
            k, v = (y.repeat_interleave(2, 1) for y in (k, v))
        else:
            k, v = (y.unsqueeze(2).expand(-1, -1, 2, -1, -1).flatten(1, 2) for y in (k, v))
        return x + m.out_layer(_attend(q, k, v, fused=b.flag))

    return Part(
        i,
        forward,
        q=nn.Linear(i, 2 * heads * size),
        k=nn.Linear(i, heads * size),
        v=nn.Linear(i, heads * size),
        out_layer=nn.Linear(2 * heads * size, i),
    )


# One norm for all heads mixes, unless the members agree on it.
@_block(TOKENS, plain=False)
def _attention_normed(space: Space, i: int, b: Block) -> Part:
    """Queries and keys are normalised, by one norm for all heads."""
    inner = b.parts * (b.width + 1)
    norm = nn.RMSNorm if b.flag else nn.LayerNorm

    def forward(m: Part, x: torch.Tensor) -> torch.Tensor:
        q, k, v = m.qkv(x).unflatten(-1, (3, b.parts, b.width + 1)).permute(2, 0, 3, 1, 4)
        return x + m.out_layer(_attend(m.norm_q(q), m.norm_k(k), v, fused=b.flag))

    return Part(
        i,
        forward,
        qkv=nn.Linear(i, 3 * inner),
        norm_q=norm(b.width + 1),
        norm_k=norm(b.width + 1),
        out_layer=nn.Linear(inner, i),
    )


@_block(TOKENS)
def _attention_rotary(space: Space, i: int, b: Block) -> Part:
    """Rotary positions: constants for each token and each pair of a head's neurons."""
    size = 2 * (b.width // 2)
    inner = b.parts * size
    angle = torch.outer(torch.arange(_TOKENS), 0.5 ** torch.arange(size // 2)).double()

    def turn(x: torch.Tensor) -> torch.Tensor:
        if b.flag:
            cos, sin = (f(angle).repeat(1, 2) for f in (torch.cos, torch.sin))
            left, right = x.chunk(2, -1)
            return x * cos + torch.cat([-right, left], -1) * sin
        cos, sin = angle.cos(), angle.sin()
        even, odd = x[..., ::2], x[..., 1::2]
        return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)

    def forward(m: Part, x: torch.Tensor) -> torch.Tensor:
        q, k, v = m.qkv(x).unflatten(-1, (3, b.parts, size)).permute(2, 0, 3, 1, 4)
        return x + m.out_layer(_attend(turn(q), turn(k), v, fused=b.flag))

    return Part(i, forward, qkv=nn.Linear(i, 3 * inner), out_layer=nn.Linear(inner, i))


@_block(TOKENS)
def _attention_by_hand(space: Space, i: int, b: Block) -> Part:
    """Heads join the batch for `bmm`, or stay a letter of an einsum."""
    inner = b.parts * b.width

    def forward(m: Part, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, _ = x.shape
        q, k, v = (y(x).view(batch, tokens, b.parts, b.width) for y in (m.q, m.k, m.v))
        if b.flag:
            scores = torch.einsum("bthd,bshd->bhts", q, k).softmax(-1)
            y = torch.einsum("bhts,bshd->bthd", scores, v)
        else:
            q, k, v = (
                y.transpose(1, 2).reshape(batch * b.parts, tokens, b.width) for y in (q, k, v)
            )
            y = torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v)
            y = y.view(batch, b.parts, tokens, b.width).transpose(1, 2)
        return x + m.out_layer(y.reshape(batch, tokens, -1))

    return Part(
        i,
        forward,
        **{name: nn.Linear(i, inner) for name in "qkv"},
        out_layer=nn.Linear(inner, i),
    )


@_block(TOKENS)
def _query_pooled(space: Space, i: int, b: Block) -> Part:
    """A learned query pools the tokens; what it finds is given to all of them."""
    inner = b.parts * b.width

    def forward(m: Part, x: torch.Tensor) -> torch.Tensor:
        k, v = (y(x).unflatten(-1, (b.parts, b.width)).transpose(1, 2) for y in (m.k, m.v))
        q = m.query.expand(x.shape[0], -1, -1, -1)
        return x + m.out_layer(_attend(q, k, v, fused=b.flag))

    return Part(
        i,
        forward,
        query=torch.randn(1, b.parts, 1, b.width),
        k=nn.Linear(i, inner),
        v=nn.Linear(i, inner),
        out_layer=nn.Linear(inner, i),
    )


@_block(TOKENS, plain=False)
def _rms_norm(space: Space, i: int, b: Block) -> Part:
    """RMSNorm and a gated MLP."""
    return Part(
        i,
        lambda m, x: x + m.down(F.silu(m.gate(y := m.norm(x))) * m.up(y)),
        norm=nn.RMSNorm(i),
        gate=nn.Linear(i, b.width),
        up=nn.Linear(i, b.width),
        down=nn.Linear(b.width, i),
    )


# --- along one dimension, by index, by value, in frequencies ------------------------------------


@_block(IMAGE, TOKENS)
def _scatter(space: Space, i: int, b: Block) -> Part:
    """Pixels or tokens, added up where an index says: a graph network."""
    dim = 3 - space.dim  # tokens, or the height

    def forward(m: Part, x: torch.Tensor) -> torch.Tensor:
        y = m.layer(x)
        target = torch.arange(x.shape[dim], device=x.device).flip(0) // 2
        if b.parts == 2:
            return x + torch.zeros_like(y).index_add(dim, target, _act(y))
        shape = [-1 if d == dim else 1 for d in range(x.dim())]
        index = target.view(shape).expand_as(y)
        if b.flag:
            return x + torch.zeros_like(y).scatter_reduce(dim, index, y, "amax")
        return x + y.scatter_add(dim, index, _act(y))

    return Part(i, forward, layer=space.layer(i, i))


@_block(*SPACES, plain=False)
def _extremes(space: Space, i: int, b: Block) -> Part:
    """A gate from the largest and the median channel, or the two largest ones beside all."""

    def forward(m: Part, x: torch.Tensor) -> torch.Tensor:
        y = m.layer(x)
        if b.flag:
            return torch.cat([_act(y), y.topk(2, space.dim)[0]], space.dim)
        most, middle = y.max(space.dim, keepdim=True)[0], y.median(space.dim, keepdim=True)[0]
        return _act(y) * (most - middle).sigmoid()

    width = max(b.width, 4)
    out = width + 2 if b.flag else width
    return Part(out, forward, layer=space.layer(i, width))


@_block(IMAGE, TOKENS)
def _frequencies(space: Space, i: int, b: Block) -> Part:
    """A filter for each channel in the frequencies of the pixels or tokens."""
    dims = (2, 3) if space is IMAGE else (1,)

    def forward(m: Part, x: torch.Tensor) -> torch.Tensor:
        sizes = [x.shape[d] for d in dims]
        y = torch.fft.rfftn(m.layer(x), dim=dims)
        shape = (-1, 1, 1) if space is IMAGE else (-1,)
        if b.flag:
            y = y * torch.view_as_complex(m.filter).view(shape)
        else:
            y = torch.complex(y.real * m.filter[:, 0].view(shape), y.imag)
        return _act(torch.fft.irfftn(y, s=sizes, dim=dims))

    return Part(b.width, forward, layer=space.layer(i, b.width), filter=torch.randn(b.width, 2))


@_block(*SPACES)
def _cell(space: Space, i: int, b: Block) -> Part:
    """Two steps of a cell of one's own, whose first state is zero."""

    def forward(m: Part, x: torch.Tensor) -> torch.Tensor:
        sizes = list(x.shape)
        sizes[space.dim] = b.width
        h = x.new_zeros(sizes)
        for _ in range(2):
            parts = [h, x] if b.flag else [x, h]
            new, gate = m.layer(torch.cat(parts, space.dim)).chunk(2, space.dim)
            h = h + gate.sigmoid() * new.tanh()
        return h

    return Part(b.width, forward, layer=space.layer(i + b.width, 2 * b.width))


@_block(TOKENS, VECTOR, plain=False)
def _experts(space: Space, i: int, b: Block) -> Part:
    """All experts in one einsum, with an ellipsis; or two factors of a weight in one."""
    if not b.flag:
        return Part(
            b.width,
            lambda m, x: _act(torch.einsum("...i,ir,ro->...o", x, m.down, m.up)),
            down=torch.randn(i, b.parts),
            up=torch.randn(b.parts, b.width),
        )

    def forward(m: Part, x: torch.Tensor) -> torch.Tensor:
        inner = _act(torch.einsum("...i,eih->...eh", x, m.first))
        return torch.einsum("...eh,eho,...e->...o", inner, m.second, m.route(x).softmax(-1))

    return Part(
        b.width,
        forward,
        first=torch.randn(b.parts, i, 3),
        second=torch.randn(b.parts, 3, b.width),
        route=space.layer(i, b.parts),
    )


# Knots that the members do not have in common are averaged.
@_block(VECTOR, TOKENS, plain=False)
def _basis(space: Space, i: int, b: Block) -> Part:
    """A layer over inputs × basis functions, with knots for all inputs or for each."""
    knots = torch.linspace(-1, 1, 4)

    def forward(m: Part, x: torch.Tensor) -> torch.Tensor:
        away = x.unsqueeze(-1) - m.knots
        if b.flag:
            width = m.knots[:, 1:] - m.knots[:, :-1]
            bases = (away[..., :-1] / (width.square() + 0.1)).sigmoid()
        else:
            bases = (-away.square()).exp()
        return F.linear(bases.flatten(-2), m.weight.flatten(1))

    return Part(
        b.width,
        forward,
        knots=knots.repeat(i, 1) if b.flag else knots,
        weight=torch.randn(b.width, i, 3 if b.flag else 4),
    )


@_block(TOKENS, VECTOR, plain=False)
def _squared(space: Space, i: int, b: Block) -> Part:
    """Channels as a square matrix that is multiplied by itself: one unit along two dimensions."""
    side = b.parts

    def forward(m: Part, x: torch.Tensor) -> torch.Tensor:
        y = m.layer(x).unflatten(-1, (side, side))
        y = (y.mT if b.flag else y) @ y
        return m.out_layer(_act(y.flatten(-2)))

    return Part(
        b.width,
        forward,
        layer=space.layer(i, side * side),
        out_layer=space.layer(side * side, b.width),
    )


@_block(TOKENS, VECTOR)
def _filled(space: Space, i: int, b: Block) -> Part:
    """Memory that is made first and filled later, or zeros in the shape of reshaped channels."""

    def forward(m: Part, x: torch.Tensor) -> torch.Tensor:
        y = _act(m.layer(x)).unflatten(-1, (b.parts, b.width))
        if b.flag:
            return (torch.zeros_like(y) + y).flatten(-2)
        memory = y.new_empty(y.shape)
        for part in range(b.parts):
            memory[..., part, :] = y[..., part, :]
        return memory.flatten(-2)

    return Part(b.parts * b.width, forward, layer=space.layer(i, b.parts * b.width))


# --- networks -----------------------------------------------------------------------------------


class Network(nn.Module):
    """What a recipe says."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.stem = _conv(3, recipe.stem)
        self.images, width = _chain(IMAGE, recipe.images, recipe.stem)
        self.tokens, width = _chain(TOKENS, recipe.tokens, width)
        self.end = nn.LazyLinear(max(width, 2))
        self.vectors, width = _chain(VECTOR, recipe.vectors, max(width, 2))
        self.head = nn.Linear(width, CLASSES)
        if recipe.output != "one":
            self.second = nn.Linear(self.end.out_features, CLASSES)

    def forward(self, x: torch.Tensor) -> Any:
        x = self.images(_act(self.stem(x)))
        if self.recipe.bridge == "tokens":
            x = self.tokens(F.adaptive_avg_pool2d(x, _SIDE).flatten(2).transpose(1, 2))
            if self.recipe.end == "flatten":
                x = x.flatten(1)
            else:
                x = x.mean(1) if self.recipe.end == "mean" else x[:, -1]
        else:
            x = x.flatten(1) if self.recipe.bridge == "flatten" else x.mean((2, 3))
        x = self.end(x)
        first = self.head(self.vectors(x))
        if self.recipe.output == "one":
            return first
        second = self.second(x)
        return (first, second) if self.recipe.output == "tuple" else {"b": second, "a": first}


def _chain(space: Space, blocks: Iterable[Block], width: int) -> tuple[nn.Sequential, int]:
    parts = []
    for block in blocks:
        parts.append(BLOCKS[block.kind].build(space, width, block))
        width = parts[-1].out
    return nn.Sequential(*parts), width


def images(batch: int = 2, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, _SIDE, _SIDE, generator=generator, dtype=torch.float64)


def build(recipe: Recipe, seed: int = 0) -> Network:
    """The network in float64, with weights that let the input through, in eval mode."""
    torch.manual_seed(seed)
    model = Network(recipe).double()
    model.eval()
    model(images())  # sizes the lazy layer
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=(2 / max(parameter[0].numel(), 1)) ** 0.5)
    excite(model, images(8, seed=1))
    return model


def members_of(recipe: Recipe, n: int) -> list[Program]:
    """Members of one architecture."""
    return programs((build(recipe, seed) for seed in range(n)), images())


def is_plain(recipe: Recipe) -> bool:
    """Whether no operator mixes members, so that wide equals ensemble exactly."""
    norms = any(block.kind == "norm" for block in recipe.tokens)
    kinds = {b.kind for b in (*recipe.images, *recipe.tokens, *recipe.vectors)} - {"norm"}
    return not norms and all(BLOCKS[kind].plain for kind in kinds)


def kinds(space: Space, *, plain: bool = False) -> list[str]:
    """The kinds of block that can stand in a space."""
    return [
        name for name, kind in BLOCKS.items() if space in kind.spaces and (kind.plain or not plain)
    ]


def _blocks(space: Space, most: int, plain: bool) -> st.SearchStrategy[tuple[Block, ...]]:
    block = st.builds(
        Block,
        st.sampled_from(kinds(space, plain=plain)),
        st.integers(2, 4),
        st.integers(2, 3),
        st.booleans(),
    )
    return st.lists(block, max_size=most).map(tuple)


def recipes(*, plain: bool = False) -> st.SearchStrategy[Recipe]:
    """Recipes of networks; with `plain` none with an operator that mixes members."""
    stem, image, vector = st.integers(2, 6), _blocks(IMAGE, 4, plain), _blocks(VECTOR, 2, plain)
    bridge, end = (
        st.sampled_from(["mean", "flatten"]),
        st.sampled_from(["mean", "flatten", "last"]),
    )
    tokens, output = _blocks(TOKENS, 3, plain), st.sampled_from(OUTPUTS)
    return st.one_of(
        st.builds(Recipe, stem, image, bridge, vectors=vector, output=output),
        st.builds(Recipe, stem, image, st.just("tokens"), tokens, end, vector, output),
    )
