"""Small networks for tests."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

import fxfuse
from fxfuse.graph.rebuild import rebuild
from tests.models import excite


class Block(nn.Module):
    """A residual block with BatchNorm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.bn1(self.conv1(x)).relu()
        return (x + self.bn2(self.conv2(out))).relu()


class SmallResNet(nn.Module):
    """Two residual blocks, dropout, a linear head."""

    def __init__(self, width: int = 8, classes: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.block1 = Block(width)
        self.block2 = Block(width)
        self.drop = nn.Dropout(0.1)
        self.fc = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn(self.stem(x)).relu()
        x = self.block2(self.block1(x))
        return self.fc(self.drop(x.mean((2, 3))))


class Residual(nn.Module):
    """[*, inputs] → [*, 3]: residual blocks on a stream of `width`, `hidden` wide inside."""

    def __init__(self, blocks: int, inputs: int, width: int, hidden: int) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(inputs, width), nn.Linear(width, 3)
        parts = [
            [nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width)] for _ in range(blocks)
        ]
        self.blocks = nn.ModuleList([nn.Sequential(*part) for part in parts])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def images(batch: int = 4, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """[batch, 3, 8, 8]."""
    return torch.randn(batch, 3, 8, 8, dtype=dtype)


def resnets(n: int, dtype: torch.dtype = torch.float32) -> list[SmallResNet]:
    """Excited small residual networks with different weights."""
    found = []
    for seed in range(n):
        torch.manual_seed(seed)
        found.append(excite(SmallResNet().to(dtype), images(8, dtype)))
    return found


def programs(models: Iterable[nn.Module], example: Any) -> list[fxfuse.Program]:
    """Networks of one architecture, captured; they share the first one's graph: one export."""
    first, *others = models
    program = fxfuse.capture(first, example)
    states = (other.state_dict(keep_vars=True) for other in others)
    return [program, *(replace(program, module=rebuild(program.module, s)) for s in states)]


@dataclass(frozen=True)
class Samples:
    """Networks by name, how to make each and the shape of an input, and random inputs for them."""

    networks: Mapping[str, tuple[Callable[[], nn.Module], tuple[int, ...]]]
    count: int

    def inputs(self, name: str, n: int | None = None, seed: int = 0) -> torch.Tensor:
        """Inputs [n, *]."""
        shape, generator = self.networks[name][1], torch.Generator().manual_seed(seed)
        return torch.randn(n or self.count, *shape, generator=generator)

    def members(self, name: str, n: int = 2, *, same: bool = False) -> list[nn.Module]:
        """Networks with random weights, the same ones or others, whose norms know the inputs."""
        members = []
        for seed in range(n):
            torch.manual_seed(0 if same else seed)
            members.append(excite(self.networks[name][0](), self.inputs(name, 40)))
        return members


def mean_of(members: Sequence[nn.Module], x: torch.Tensor) -> torch.Tensor:
    """The mean of the members' outputs in eval mode."""
    with torch.no_grad():
        return torch.stack([m.eval()(x) for m in members]).mean(0)
