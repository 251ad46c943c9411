"""The networks of the benchmarks, for signals (one dimension) and images (two) alike.

All are small: one trains in seconds on one core. `width` scales every hidden width; `depth` counts
hidden layers (MLP), convolutions (VGG), residual or transformer blocks.

Notation of shapes: b batch, c channels, k classes, s positions (length, or height and width).
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional

_CONV = {1: nn.Conv1d, 2: nn.Conv2d}
_NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d}
_POOL = {1: nn.MaxPool1d, 2: nn.MaxPool2d}
_CHANNELS = (16, 32, 64)


def _per_stage(depth: int) -> list[int]:
    """How many layers each of three stages gets; the last ones get those that are left over."""
    return [(depth + stage) // 3 for stage in range(3)]


class MLP(nn.Module):
    """Hidden layers with ReLU on the flattened input."""

    def __init__(
        self, shape: tuple[int, ...], classes: int, width: float = 1.0, depth: int = 3
    ) -> None:
        super().__init__()
        hidden = round(128 * width)
        sizes = [torch.Size(shape).numel(), *[hidden] * depth]
        self.hidden = nn.ModuleList(nn.Linear(i, o) for i, o in itertools.pairwise(sizes))
        self.head = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        """[b, c, *s] → [b, k]."""
        x = x.flatten(1)
        for layer in self.hidden:
            x = torch.relu(layer(x))
        return self.head(x)


class VGG(nn.Module):
    """Convolutions with BatchNorm in three stages that end in pooling, a hidden layer, a head."""

    def __init__(
        self, shape: tuple[int, ...], classes: int, width: float = 1.0, depth: int = 4
    ) -> None:
        super().__init__()
        dims = len(shape) - 1
        last, layers = shape[0], []
        for channels, count in zip(_CHANNELS, _per_stage(depth), strict=True):
            for _ in range(count):
                out = round(channels * width)
                layers += [
                    _CONV[dims](last, out, 3, padding=1, bias=False),
                    _NORM[dims](out),
                    nn.ReLU(),
                ]
                last = out
            layers.append(_POOL[dims](2))
        self.features = nn.Sequential(*layers)
        positions = torch.Size(side // 8 for side in shape[1:]).numel()
        hidden = round(64 * width)
        self.hidden = nn.Linear(last * positions, hidden)
        self.head = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        """[b, c, *s] → [b, k]."""
        return self.head(torch.relu(self.hidden(self.features(x).flatten(1))))


class Block(nn.Module):
    """Two convolutions with BatchNorm and a shortcut; a change of channels halves positions."""

    def __init__(self, dims: int, inputs: int, outputs: int) -> None:
        super().__init__()
        conv, norm = _CONV[dims], _NORM[dims]
        stride = 1 if inputs == outputs else 2
        self.conv1 = conv(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = norm(outputs)
        self.conv2 = conv(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = norm(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if inputs != outputs:
            self.shortcut = nn.Sequential(
                conv(inputs, outputs, 1, stride, bias=False), norm(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """[b, inputs, *s] → [b, outputs, *s']."""
        y = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """A stem, residual blocks in three stages, mean over positions, head."""

    def __init__(
        self, shape: tuple[int, ...], classes: int, width: float = 1.0, depth: int = 3
    ) -> None:
        super().__init__()
        dims = len(shape) - 1
        widths = [
            round(channels * width)
            for channels, count in zip(_CHANNELS, _per_stage(depth), strict=True)
            for _ in range(count)
        ]
        # Images are large enough to halve at once; signals are not.
        self.stem = nn.Sequential(
            _CONV[dims](shape[0], widths[0], 3, stride=dims, padding=1, bias=False),
            _NORM[dims](widths[0]),
            nn.ReLU(),
        )
        pairs = zip([widths[0], *widths], widths, strict=False)
        self.blocks = nn.Sequential(*(Block(dims, i, o) for i, o in pairs))
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """[b, c, *s] → [b, k]."""
        return self.head(self.blocks(self.stem(x)).flatten(2).mean(2))


class Encoder(nn.Module):
    """A pre-norm transformer block: self-attention, then two layers with GELU."""

    def __init__(self, size: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(size), nn.LayerNorm(size)
        self.qkv, self.proj = nn.Linear(size, 3 * size), nn.Linear(size, size)
        self.fc1, self.fc2 = nn.Linear(size, hidden), nn.Linear(hidden, size)

    def forward(self, x: Tensor) -> Tensor:
        """[b, s, size] → [b, s, size]."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.proj(attended)
        return x + self.fc2(functional.gelu(self.fc1(self.norm2(x))))


class ViT(nn.Module):
    """Patches, a class token, learned positions, transformer blocks, head on the class token."""

    def __init__(
        self, shape: tuple[int, ...], classes: int, width: float = 1.0, depth: int = 3
    ) -> None:
        super().__init__()
        dims = len(shape) - 1
        patch = 4 if dims == 1 else shape[1] // 4
        heads = round(4 * width)
        size = 16 * heads
        positions = 1 + torch.Size(side // patch for side in shape[1:]).numel()
        self.patches = _CONV[dims](shape[0], size, patch, stride=patch)
        self.token = nn.Parameter(torch.zeros(1, 1, size))
        self.positions = nn.Parameter(0.02 * torch.randn(1, positions, size))
        self.blocks = nn.Sequential(*(Encoder(size, heads, 2 * size) for _ in range(depth)))
        self.norm = nn.LayerNorm(size)
        self.head = nn.Linear(size, classes)

    def forward(self, x: Tensor) -> Tensor:
        """[b, c, *s] → [b, k]."""
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])


NETWORKS: dict[str, type[nn.Module]] = {"mlp": MLP, "vgg": VGG, "resnet": ResNet, "vit": ViT}
