"""Networks of the coverage sweep that no library holds, in plain torch: one per kind of operator.

`NETWORKS` gives for each name a function that makes the network and one that makes its inputs.
They are as small as they can be while each operator still does what it does in the large one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

CLASSES = 5
BATCH = 2

#: Makes the network; makes positional inputs.
Network = tuple[Callable[[], nn.Module], Callable[[], tuple[Any, ...]]]


def _image(side: int = 8, channels: int = 3) -> Callable[[], tuple[Any, ...]]:
    return lambda: (torch.randn(BATCH, channels, side, side),)


def _tokens(length: int = 6, width: int = 7) -> Callable[[], tuple[Any, ...]]:
    return lambda: (torch.randn(BATCH, length, width),)


# --- graphs: features of nodes [n, c], or [b, n, c] for one graph -------------------------------


def _edges() -> torch.Tensor:
    """[2, e]: where each edge begins and where it ends."""
    source = [0, 1, 2, 3, 4, 5, 6, 1, 3, 5, 7, 0]
    return torch.tensor([source, [1, 2, 3, 4, 5, 6, 7, 0, 2, 4, 0, 5]])


class GCN(nn.Module):
    """Graph convolutions with symmetric normalisation (Kipf and Welling)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(7, 16), nn.Linear(16, 12)])
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
        source, target = edges[0], edges[1]
        degree = torch.ones_like(x[:, 0]).index_add(0, target, torch.ones_like(target).to(x))
        norm = (degree[source] * degree[target]).rsqrt()
        for layer in self.layers:
            h = layer(x)
            x = F.silu(h.index_add(0, target, h[source] * norm[:, None]))
        return self.head(x)


class GIN(nn.Module):
    """Sums over neighbours, then an MLP; the read-out sums over parts of a graph."""

    def __init__(self, edges: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("edges", edges)
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(i, 14), nn.LayerNorm(14), nn.ReLU(), nn.Linear(14, 10))
            for i in (7, 10)
        )
        self.eps = nn.ParameterList(torch.zeros(1) for _ in range(2))
        self.head = nn.Linear(10, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, _ = x.shape
        source, target = self.edges[0], self.edges[1]
        index = target[None, :, None]
        for eps, mlp in zip(self.eps, self.mlps, strict=True):
            total = torch.zeros_like(x).scatter_add(
                1, index.expand(b, -1, x.shape[2]), x[:, source]
            )
            x = F.silu(mlp((1 + eps) * x + total))
        part = torch.arange(n, device=x.device) // 4
        return self.head(x.new_zeros(b, n // 4, 10).index_add_(1, part, x))


class GAT(nn.Module):
    """Attention over the edges that end in a node."""

    def __init__(self, edges: torch.Tensor, width: int = 6, heads: int = 3) -> None:
        super().__init__()
        self.register_buffer("edges", edges)
        self.heads, self.width = heads, width
        self.project = nn.Linear(7, heads * width, bias=False)
        self.of_source = nn.Parameter(torch.randn(1, heads, width))
        self.of_target = nn.Parameter(torch.randn(1, heads, width))
        self.head = nn.Linear(heads * width, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        source, target = self.edges[0], self.edges[1]
        h = self.project(x).unflatten(-1, (self.heads, self.width))
        score = (h * self.of_source).sum(-1)[:, source] + (h * self.of_target).sum(-1)[:, target]
        score = F.leaky_relu(score, 0.2)
        index = target[None, :, None].expand_as(score)
        most = torch.full_like(h[..., 0], -1e9).scatter_reduce(
            1, index, score, reduce="amax", include_self=False
        )
        weight = (score - most[:, target]).exp()
        total = torch.zeros_like(most).index_add(1, target, weight)
        weight = weight / (total[:, target] + 1e-9)
        out = torch.zeros_like(h).index_add(1, target, h[:, source] * weight[..., None])
        return self.head(F.elu(out.flatten(2)))


# --- states --------------------------------------------------------------------------------------


class ConvLSTM(nn.Module):
    """A cell of convolutions whose first state is zero."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.width = width
        self.gates = nn.Conv2d(3 + width, 4 * width, 3, padding=1)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, steps, _, height, wide = x.shape
        h = x.new_zeros(b, self.width, height, wide)
        c = torch.zeros_like(h)
        for t in range(steps):
            i, f, o, g = self.gates(torch.cat([x[:, t], h], 1)).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        return self.head(h.mean((2, 3)))


class Mamba(nn.Module):
    """The reference scan of a selective state space model."""

    def __init__(self, width: int = 8, inner: int = 12, states: int = 4, rank: int = 2) -> None:
        super().__init__()
        self.states, self.rank = states, rank
        self.embed = nn.Linear(7, width)
        self.norm = nn.LayerNorm(width)
        self.inner = nn.Linear(width, 2 * inner, bias=False)
        self.conv = nn.Conv1d(inner, inner, 3, padding=2, groups=inner)
        self.parameters_of = nn.Linear(inner, rank + 2 * states, bias=False)
        self.step = nn.Linear(rank, inner)
        self.log_a = nn.Parameter(torch.rand(inner, states))
        self.skip = nn.Parameter(torch.ones(inner))
        self.out = nn.Linear(inner, width, bias=False)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.embed(x)
        y, gate = self.inner(self.norm(h)).chunk(2, -1)
        y = F.silu(self.conv(y.transpose(1, 2))[..., : x.shape[1]]).transpose(1, 2)
        step, b, c = self.parameters_of(y).split([self.rank, self.states, self.states], -1)
        step = F.softplus(self.step(step))
        decay = torch.exp(torch.einsum("bld,dn->bldn", step, -self.log_a.exp()))
        drive = torch.einsum("bld,bln,bld->bldn", step, b, y)
        state = torch.zeros_like(decay[:, 0])
        outputs = []
        for t in range(x.shape[1]):
            state = decay[:, t] * state + drive[:, t]
            outputs.append(torch.einsum("bdn,bn->bd", state, c[:, t]))
        y = torch.stack(outputs, 1) + y * self.skip
        return self.head(h + self.out(y * F.silu(gate)))


class RWKV(nn.Module):
    """Time mixing and channel mixing, with the reference loop over time."""

    def __init__(self, width: int = 8, inner: int = 16) -> None:
        super().__init__()
        self.embed = nn.Linear(7, width)
        self.norm, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix = nn.ParameterList(torch.rand(1, 1, width) for _ in range(5))
        self.key, self.value, self.gate = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.decay, self.bonus = nn.Parameter(torch.rand(width)), nn.Parameter(torch.rand(width))
        self.out = nn.Linear(width, width, bias=False)
        self.key2 = nn.Linear(width, inner, bias=False)
        self.value2 = nn.Linear(inner, width, bias=False)
        self.gate2 = nn.Linear(width, width, bias=False)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.embed(x)
        y = self.norm(h)
        before = F.pad(y, (0, 0, 1, -1))
        k, v, r = (
            layer(y * m + before * (1 - m))
            for layer, m in zip((self.key, self.value, self.gate), self.mix, strict=False)
        )
        top, below = torch.zeros_like(k[:, 0]), torch.zeros_like(k[:, 0])
        decay, outputs = torch.exp(-self.decay.exp()), []
        for t in range(x.shape[1]):
            now = (self.bonus + k[:, t]).exp()
            outputs.append((top + now * v[:, t]) / (below + now))
            top = decay * top + k[:, t].exp() * v[:, t]
            below = decay * below + k[:, t].exp()
        h = h + self.out(r.sigmoid() * torch.stack(outputs, 1))
        y = self.norm2(h)
        before = F.pad(y, (0, 0, 1, -1))
        k = self.key2(y * self.mix[3] + before * (1 - self.mix[3])).relu().square()
        r = self.gate2(y * self.mix[4] + before * (1 - self.mix[4]))
        return self.head(h + r.sigmoid() * self.value2(k))


# --- attention over channels and pixels ----------------------------------------------------------


class CBAM(nn.Module):
    """Attention over channels, then over pixels, by means and maxima."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width))
        self.mlp = nn.Sequential(nn.Linear(width, 4), nn.SiLU(), nn.Linear(4, width))
        self.space = nn.Conv2d(2, 1, 3, padding=1)
        self.conv = nn.Conv2d(width, 10, 3, padding=1)
        self.head = nn.Linear(10, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        gate = self.mlp(x.mean((2, 3))) + self.mlp(x.amax((2, 3)))
        x = x * gate.sigmoid()[:, :, None, None]
        two = torch.cat([x.max(1, keepdim=True)[0], x.mean(1, keepdim=True)], 1)
        x = F.silu(self.conv(x * self.space(two).sigmoid()))
        return self.head(x.mean((2, 3)))


class ResNeSt(nn.Module):
    """A residual block of split attention: `radix` parts of each of `groups` groups."""

    def __init__(self, width: int = 12, radix: int = 2, groups: int = 1) -> None:
        super().__init__()
        self.radix, self.groups = radix, groups
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.conv = nn.Conv2d(width, width * radix, 3, padding=1, groups=groups * radix)
        self.norm = nn.BatchNorm2d(width * radix)
        self.squeeze = nn.Conv2d(width, 8, 1, groups=groups)
        self.excite = nn.Conv2d(8, width * radix, 1, groups=groups)
        self.out = nn.Conv2d(width, width, 1)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        b = x.shape[0]
        y = F.silu(self.norm(self.conv(x)))
        parts = y.reshape(b, self.radix, y.shape[1] // self.radix, *y.shape[2:])
        pooled = parts.sum(1).mean((2, 3), keepdim=True)
        gate = self.excite(F.silu(self.squeeze(pooled)))
        gate = gate.view(b, self.groups, self.radix, -1).transpose(1, 2).softmax(1)
        y = (parts * gate.reshape(b, self.radix, -1, 1, 1)).sum(1)
        return self.head(F.silu(x + self.out(y)).mean((2, 3)))


# --- kernels that the data decide ----------------------------------------------------------------


class CondConv(nn.Module):
    """Each example's kernel is a mixture of experts' kernels."""

    def __init__(self, width: int = 10, experts: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.experts = nn.Parameter(torch.randn(experts, 8, width, 3, 3) * 0.2)
        self.route = nn.Linear(width, experts)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.silu(self.stem(x))
        b, c, height, wide = x.shape
        routes = self.route(x.mean((2, 3))).sigmoid()
        kernel = torch.einsum("be,eoikl->boikl", routes, self.experts)
        x = x.reshape(1, b * c, height, wide)
        x = F.conv2d(x, kernel.reshape(b * 8, c, 3, 3), padding=1, groups=b)
        return self.head(F.silu(x.reshape(b, 8, height, wide)).mean((2, 3)))


class StyleGAN2(nn.Module):
    """A synthesis block: modulated and demodulated convolutions, noise, a skip to RGB."""

    def __init__(self, width: int = 10, style: int = 8) -> None:
        super().__init__()
        self.mapping = nn.Sequential(
            nn.Linear(6, style), nn.LeakyReLU(0.2), nn.Linear(style, style)
        )
        self.start = nn.Parameter(torch.randn(1, width, 4, 4))
        self.affine = nn.Linear(style, width)
        self.weight = nn.Parameter(torch.randn(12, width, 3, 3))
        self.noise, self.bias = nn.Parameter(torch.rand(1)), nn.Parameter(torch.zeros(12))
        self.to_rgb_style = nn.Linear(style, 12)
        self.to_rgb = nn.Parameter(torch.randn(3, 12, 1, 1))

    @staticmethod
    def modulated(
        x: torch.Tensor, weight: torch.Tensor, style: torch.Tensor, demodulate: bool
    ) -> torch.Tensor:
        b, c, height, wide = x.shape
        kernel = weight[None] * (1 + style)[:, None, :, None, None]
        if demodulate:
            kernel = kernel * (kernel.square().sum((2, 3, 4), keepdim=True) + 1e-8).rsqrt()
        x = x.reshape(1, b * c, height, wide)
        x = F.conv2d(x, kernel.flatten(0, 1), padding=weight.shape[-1] // 2, groups=b)
        return x.reshape(b, weight.shape[0], height, wide)

    def forward(self, z: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        style = self.mapping(z * (z.square().mean(1, keepdim=True) + 1e-8).rsqrt())
        x = self.start.expand(z.shape[0], -1, -1, -1)
        x = self.modulated(x, self.weight, self.affine(style), True)
        x = F.leaky_relu(x + noise * self.noise + self.bias[:, None, None], 0.2)
        return self.modulated(x, self.to_rgb, self.to_rgb_style(style), False)


# --- Fourier ------------------------------------------------------------------------------------


class FNO(nn.Module):
    """A layer of a Fourier neural operator: low frequencies times complex weights."""

    def __init__(self, width: int = 8, modes: int = 3) -> None:
        super().__init__()
        self.modes = modes
        self.lift = nn.Linear(1, width)
        self.spectral = nn.Parameter(torch.randn(width, width, modes, dtype=torch.cfloat) * 0.2)
        self.point = nn.Conv1d(width, width, 1)
        self.project = nn.Sequential(nn.Linear(width, 10), nn.GELU(), nn.Linear(10, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.lift(x).transpose(1, 2)
        spectrum = torch.fft.rfft(x)
        low = torch.einsum("bix,iox->box", spectrum[..., : self.modes], self.spectral)
        out = torch.zeros(
            x.shape[0], low.shape[1], spectrum.shape[-1], dtype=spectrum.dtype, device=x.device
        )
        out[..., : self.modes] = low
        x = F.gelu(torch.fft.irfft(out, n=x.shape[-1]) + self.point(x))
        return self.project(x.transpose(1, 2))


class FNet(nn.Module):
    """The real part of a transform over tokens and channels instead of attention."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Linear(7, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.mlp = nn.Sequential(nn.Linear(width, 20), nn.GELU(), nn.Linear(20, width))
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        x = self.norms[0](x + torch.fft.fft(torch.fft.fft(x, dim=-1), dim=-2).real)
        return self.head(self.norms[1](x + self.mlp(x)).mean(1))


class GFNet(nn.Module):
    """A filter for each channel in the frequencies of the image."""

    def __init__(self, width: int = 10, side: int = 4) -> None:
        super().__init__()
        self.side = side
        self.patch = nn.Conv2d(3, width, 2, stride=2)
        self.norm, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.filter = nn.Parameter(torch.randn(side, side // 2 + 1, width, 2) * 0.3)
        self.mlp = nn.Sequential(nn.Linear(width, 18), nn.GELU(), nn.Linear(18, width))
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        y = self.norm(x).unflatten(1, (self.side, self.side))
        y = torch.fft.rfft2(y, dim=(1, 2), norm="ortho") * torch.view_as_complex(self.filter)
        y = torch.fft.irfft2(y, s=(self.side, self.side), dim=(1, 2), norm="ortho").flatten(1, 2)
        return self.head((x + self.mlp(self.norm2(y))).mean(1))


class Spectrogram(nn.Module):
    """A short-time transform and a filter bank in front of convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("window", torch.hann_window(16))
        self.register_buffer("bank", torch.rand(6, 9))
        self.conv = nn.Conv1d(6, 12, 3, padding=1)
        self.second = nn.Conv1d(12, 10, 3, padding=1)
        self.head = nn.Linear(10, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        spectrum = torch.stft(x, 16, 8, window=self.window, return_complex=True).abs().square()
        x = (self.bank @ spectrum + 1e-5).log()
        return self.head(F.silu(self.second(F.silu(self.conv(x)))).mean(-1))


# --- bases and experts ----------------------------------------------------------------------------


class KAN(nn.Module):
    """Two layers of B-splines: a linear layer over inputs × basis functions."""

    class Layer(nn.Module):
        def __init__(self, inputs: int, outputs: int, size: int = 4, order: int = 2) -> None:
            super().__init__()
            self.order = order
            step = 2 / size
            knots = torch.arange(-order, size + order + 1) * step - 1
            self.register_buffer("grid", knots.expand(inputs, -1).contiguous())
            self.base = nn.Parameter(torch.randn(outputs, inputs) * 0.4)
            self.spline = nn.Parameter(torch.randn(outputs, inputs, size + order) * 0.4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            grid, t = self.grid, x.unsqueeze(-1)
            bases = ((t >= grid[:, :-1]) & (t < grid[:, 1:])).to(x.dtype)
            for k in range(1, self.order + 1):
                left = (t - grid[:, : -k - 1]) / (grid[:, k:-1] - grid[:, : -k - 1])
                right = (grid[:, k + 1 :] - t) / (grid[:, k + 1 :] - grid[:, 1:-k])
                bases = left * bases[..., :-1] + right * bases[..., 1:]
            spline = F.linear(bases.flatten(1), self.spline.flatten(1))
            return F.linear(F.silu(x), self.base) + spline

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(KAN.Layer(4, 10), KAN.Layer(10, CLASSES))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x.tanh())


class ExpertLoop(nn.Module):
    """A loop over experts, each of which adds to the tokens that chose it."""

    def __init__(self, width: int = 8, experts: int = 3) -> None:
        super().__init__()
        self.embed = nn.Linear(7, width)
        self.route = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 12), nn.SiLU(), nn.Linear(12, width))
            for _ in range(experts)
        )
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, length, _ = x.shape
        x = self.embed(x).flatten(0, 1)
        weight, chosen = self.route(x).softmax(-1).topk(2, -1)
        weight = weight / weight.sum(-1, keepdim=True)
        gate = torch.zeros_like(self.route(x)).scatter(1, chosen, weight)
        out = torch.zeros_like(x)
        every = torch.arange(x.shape[0], device=x.device)
        for number, expert in enumerate(self.experts):
            out = out.index_add(0, every, expert(x) * gate[:, number, None])
        return self.head(x + out).view(b, length, -1)


class StackedExperts(nn.Module):
    """All experts in three tensors, mixed by one `einsum`."""

    def __init__(self, width: int = 8, inner: int = 12, experts: int = 3) -> None:
        super().__init__()
        self.embed = nn.Linear(7, width)
        self.route = nn.Linear(width, experts)
        self.up = nn.Parameter(torch.randn(experts, width, inner) * 0.3)
        self.down = nn.Parameter(torch.randn(experts, inner, width) * 0.3)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        inner = F.silu(torch.einsum("...i,eih->...eh", x, self.up))
        routes = self.route(x).softmax(-1)
        return self.head(x + torch.einsum("...eh,ehi,...e->...i", inner, self.down, routes))


# --- larger blocks --------------------------------------------------------------------------------


class _Residual(nn.Module):
    """A residual block of a diffusion network; `scale` says how the time enters (ADM)."""

    def __init__(self, i: int, o: int, time: int, scale: bool) -> None:
        super().__init__()
        self.scale = scale
        self.norm, self.conv = nn.GroupNorm(2, i), nn.Conv2d(i, o, 3, padding=1)
        self.time = nn.Linear(time, 2 * o if scale else o)
        self.norm2, self.conv2 = nn.GroupNorm(2, o), nn.Conv2d(o, o, 3, padding=1)
        self.short = nn.Conv2d(i, o, 1) if i != o else nn.Identity()

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        h = self.conv(F.silu(self.norm(x)))
        t = self.time(F.silu(t))[:, :, None, None]
        if self.scale:
            scale, shift = t.chunk(2, 1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + t)
        return self.short(x) + self.conv2(F.silu(h))


class DiffusionUNet(nn.Module):
    """Down, attention, up with skips, and an embedding of the time step."""

    def __init__(self, width: int = 8, scale: bool = False) -> None:
        super().__init__()
        self.width = width
        time = 2 * width
        self.embed = nn.Sequential(nn.Linear(width, time), nn.SiLU(), nn.Linear(time, time))
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.down = _Residual(width, width, time, scale)
        self.smaller = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.middle = _Residual(width, 2 * width, time, scale)
        self.norm = nn.GroupNorm(2, 2 * width)
        self.qkv, self.out = nn.Conv1d(2 * width, 6 * width, 1), nn.Conv1d(2 * width, 2 * width, 1)
        self.up = _Residual(3 * width, width, time, scale)
        self.last = nn.Sequential(
            nn.GroupNorm(2, width), nn.SiLU(), nn.Conv2d(width, 3, 3, padding=1)
        )

    def forward(self, x: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        half = self.width // 2
        speed = torch.exp(-math.log(10000) * torch.arange(half, device=x.device) / half)
        angle = step * speed.to(x)  # step: [b, 1]
        t = self.embed(torch.cat([angle.cos(), angle.sin()], -1))
        first = self.down(self.stem(x), t)
        h = self.middle(self.smaller(first), t)
        b, c, height, wide = h.shape
        q, k, v = self.qkv(self.norm(h).reshape(b, c, -1)).chunk(3, 1)
        weight = torch.einsum("bct,bcs->bts", q * c**-0.5, k).softmax(-1)
        h = h + self.out(torch.einsum("bts,bcs->bct", weight, v)).reshape(b, c, height, wide)
        h = F.interpolate(h, scale_factor=2.0)
        return self.last(self.up(torch.cat([h, first], 1), t))


class YOLO(nn.Module):
    """C2f blocks, pyramid pooling, and a decoupled head whose boxes are expectations."""

    class Bottlenecks(nn.Module):
        def __init__(self, i: int, o: int) -> None:
            super().__init__()
            half = o // 2
            self.first, self.last = YOLO.conv(i, o, 1), YOLO.conv(3 * half, o, 1)
            self.inner = nn.Sequential(YOLO.conv(half, half, 3), YOLO.conv(half, half, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = list(self.first(x).chunk(2, 1))
            y.append(y[-1] + self.inner(y[-1]))
            return self.last(torch.cat(y, 1))

    @staticmethod
    def conv(i: int, o: int, kernel: int, stride: int = 1) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(i, o, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(o), nn.SiLU()
        )

    def __init__(self, bins: int = 4) -> None:
        super().__init__()
        self.bins = bins
        self.stem = nn.Sequential(YOLO.conv(3, 8, 3, 2), YOLO.Bottlenecks(8, 8))
        self.deep = nn.Sequential(YOLO.conv(8, 12, 3, 2), YOLO.Bottlenecks(12, 12))
        self.pool = nn.MaxPool2d(3, 1, 1)
        self.pyramid, self.pyramid2 = YOLO.conv(12, 6, 1), YOLO.conv(24, 12, 1)
        self.neck = YOLO.Bottlenecks(20, 8)
        self.box = nn.ModuleList(
            nn.Sequential(YOLO.conv(c, 8, 3), nn.Conv2d(8, 4 * bins, 1)) for c in (8, 12)
        )
        self.kind = nn.ModuleList(
            nn.Sequential(YOLO.conv(c, 8, 3), nn.Conv2d(8, CLASSES, 1)) for c in (8, 12)
        )
        self.register_buffer("steps", torch.arange(bins).float())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.stem(x)
        deep = [self.pyramid(self.deep(first))]
        for _ in range(3):
            deep.append(self.pool(deep[-1]))
        low = self.pyramid2(torch.cat(deep, 1))
        high = self.neck(torch.cat([F.interpolate(low, scale_factor=2.0), first], 1))
        found = [
            torch.cat([box(level), kind(level)], 1).flatten(2)
            for level, box, kind in zip((high, low), self.box, self.kind, strict=True)
        ]
        boxes, kinds = torch.cat(found, 2).split([4 * self.bins, CLASSES], 1)
        boxes = boxes.view(x.shape[0], 4, self.bins, -1).softmax(2)
        boxes = torch.einsum("bdnp,n->bdp", boxes, self.steps)
        return torch.cat([boxes, kinds.sigmoid()], 1)


class Conformer(nn.Module):
    """Half-step feed-forward, attention with relative positions, convolution, feed-forward."""

    def __init__(self, width: int = 12, heads: int = 3) -> None:
        super().__init__()
        self.heads = heads
        self.embed = nn.Linear(7, width)
        self.forwards = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width), nn.Linear(width, 20), nn.SiLU(), nn.Linear(20, width)
            )
            for _ in range(2)
        )
        self.norm, self.qkv = nn.LayerNorm(width), nn.Linear(width, 3 * width)
        self.position = nn.Linear(width, width, bias=False)
        self.u = nn.Parameter(torch.randn(heads, width // heads) * 0.2)
        self.v = nn.Parameter(torch.randn(heads, width // heads) * 0.2)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.pointwise = nn.Conv1d(width, 2 * width, 1)
        self.depthwise = nn.Conv1d(width, width, 3, padding=1, groups=width)
        self.norm3, self.pointwise2 = nn.BatchNorm1d(width), nn.Conv1d(width, width, 1)
        self.last = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        b, t, c = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, -1).unbind(2)
        steps = torch.arange(t - 1, -t, -1, device=x.device).to(x)
        speed = torch.exp(torch.arange(0, c, 2, device=x.device).to(x) * (-math.log(1e4) / c))
        angle = steps[:, None] * speed
        p = self.position(torch.stack([angle.sin(), angle.cos()], -1).flatten(1))
        content = torch.einsum("bthd,bshd->bhts", q + self.u, k)
        place = torch.einsum("bthd,rhd->bhtr", q + self.v, p.view(2 * t - 1, self.heads, -1))
        # Row i is shifted by i: the relative shift of Transformer-XL.
        place = F.pad(place, (1, 0)).reshape(b, self.heads, 2 * t, t)[:, :, 1:]
        place = place.reshape(b, self.heads, t, 2 * t - 1)[..., :t]
        weight = ((content + place) * (c // self.heads) ** -0.5).softmax(-1)
        return self.out(torch.einsum("bhts,bshd->bthd", weight, v).reshape(b, t, c))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        x = x + 0.5 * self.forwards[0](x)
        x = x + self.attend(self.norm(x))
        y = F.glu(self.pointwise(self.norm2(x).transpose(1, 2)), 1)
        y = self.pointwise2(F.silu(self.norm3(self.depthwise(y))))
        x = x + y.transpose(1, 2)
        return self.head(self.last(x + 0.5 * self.forwards[1](x)))


class Mask2Former(nn.Module):
    """Queries attend to the pixels that their own masks leave over, then answer masks and kinds."""

    def __init__(self, width: int = 12, heads: int = 3, queries: int = 5) -> None:
        super().__init__()
        self.heads = heads
        self.stem, self.deep = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 10, 3, 2, 1)
        self.memory, self.lateral = nn.Conv2d(10, width, 1), nn.Conv2d(8, width, 1)
        self.queries = nn.Parameter(torch.randn(queries, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.q, self.kv = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 16), nn.ReLU(), nn.Linear(16, width))
        self.embed = nn.Sequential(nn.Linear(width, 14), nn.ReLU(), nn.Linear(14, width))
        self.kind = nn.Linear(width, CLASSES)

    def masks(self, x: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bqc,bchw->bqhw", self.embed(self.norms[0](x)), pixels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        high = F.silu(self.stem(x))
        low = self.memory(F.silu(self.deep(high)))
        pixels = self.lateral(high) + F.interpolate(low, scale_factor=2.0)
        y = self.queries.expand(x.shape[0], -1, -1)
        hidden = F.interpolate(self.masks(y, pixels), scale_factor=0.5).flatten(2).sigmoid() < 0.5
        hidden = hidden & ~hidden.all(-1, keepdim=True)
        k, v = self.kv(low.flatten(2).transpose(1, 2)).chunk(2, -1)
        q, k, v = (z.unflatten(-1, (self.heads, -1)).transpose(1, 2) for z in (self.q(y), k, v))
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=~hidden[:, None])
        y = self.norms[1](y + self.out(found.transpose(1, 2).flatten(2)))
        y = self.norms[2](y + self.attention(y, y, y, need_weights=False)[0])
        y = y + self.mlp(y)
        return torch.cat([self.masks(y, pixels).flatten(2), self.kind(self.norms[0](y))], -1)


NETWORKS: dict[str, Network] = {
    "gcn": (GCN, lambda: (torch.randn(8, 7), _edges())),
    "gin": (lambda: GIN(_edges()), _tokens(8)),
    "gat": (lambda: GAT(_edges()), _tokens(8)),
    "conv-lstm": (ConvLSTM, lambda: (torch.randn(BATCH, 3, 3, 6, 6),)),
    "mamba": (Mamba, _tokens()),
    "rwkv": (RWKV, _tokens()),
    "cbam": (CBAM, _image()),
    "resnest": (ResNeSt, _image()),
    "condconv": (CondConv, _image()),
    "stylegan2": (StyleGAN2, lambda: (torch.randn(BATCH, 6), torch.randn(BATCH, 1, 4, 4))),
    "fno": (FNO, lambda: (torch.randn(BATCH, 16, 1),)),
    "fnet": (FNet, _tokens()),
    "gfnet": (GFNet, _image()),
    "spectrogram": (Spectrogram, lambda: (torch.randn(BATCH, 64),)),
    "kan": (KAN, lambda: (torch.randn(BATCH, 4),)),
    "moe-loop": (ExpertLoop, _tokens()),
    "moe-stacked": (StackedExperts, _tokens()),
    "ddpm-unet": (DiffusionUNet, lambda: (*_image()(), torch.rand(BATCH, 1) * 100)),
    "adm-unet": (
        lambda: DiffusionUNet(scale=True),
        lambda: (*_image()(), torch.rand(BATCH, 1) * 100),
    ),
    "yolov8": (YOLO, _image(16)),
    "mask2former": (Mask2Former, _image(16)),
    "conformer": (Conformer, _tokens()),
}
