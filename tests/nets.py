"""Small networks for tests."""

from __future__ import annotations

import torch
from torch import nn

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
