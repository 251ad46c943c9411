"""The data sets of the benchmarks as tensors; nothing is ever downloaded."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fxfuse.cli.data import Split, mnist5k, split
from fxfuse.errors import MissingDependencyError

TORCHVISION = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "svhn": "SVHN"}
NAMES = ("mnist5k", "mnist1d", *TORCHVISION)

# Share of the training part that an official split gives to training; the rest validates.
_TRAIN_SHARE = 0.8
_SHARE_1D = 0.25


@dataclass(frozen=True)
class Data:
    """A classification data set in memory.

    Attributes:
        name: One of `NAMES`.
        inputs: Signals `[n, c, l]` or images `[n, c, h, w]`, float32.
        labels: Classes `[n]`, int64.
        official: How many of the last inputs are the official test part; 0 where there is none.
    """

    name: str
    inputs: Tensor
    labels: Tensor
    official: int = 0
    train_share: float = _TRAIN_SHARE

    @property
    def classes(self) -> int:
        return int(self.labels.max()) + 1

    def split(self, seed: int) -> Split:
        """Training, validation and test part of one repetition; an official test part stays it."""
        if not self.official:
            return split(self.labels, seed)
        first = len(self.labels) - self.official
        # `split` makes three parts, of which the last two validate here.
        rest = (1 - self.train_share) / 2
        parts = split(self.labels[:first], seed, (self.train_share, rest))
        test = torch.arange(first, len(self.labels))
        return Split(parts.train, torch.cat([parts.val, parts.test]), test)


@functools.cache
def load(name: str, root: Path | None = None) -> Data:
    """Load a data set; those of torchvision must lie below `root` already.

    Raises:
        ValueError: There is no such data set, or it needs a root.
        MissingDependencyError: A package that holds the data is not installed.
    """
    if name == "mnist5k":
        return Data(name, *mnist5k())
    if name == "mnist1d":
        return _mnist1d()
    if name not in TORCHVISION:
        raise ValueError(f"no data set {name!r}; there are {', '.join(NAMES)}")
    if root is None:
        raise ValueError(f"{name} is not downloaded: give the folder that holds it (--data-root)")
    return _torchvision(name, root)


def _mnist1d() -> Data:
    try:
        from mnist1d.data import get_dataset_args, make_dataset
    except ImportError as error:
        raise MissingDependencyError(
            "The MNIST-1D signals need the package mnist1d.",
            where="benchmarks.paper.datasets.load",
            why="It makes them from a seed, so that nothing has to be downloaded.",
            how='pip install "fxfuse[bench]"',
        ) from error
    made = make_dataset(get_dataset_args())
    inputs = torch.cat([torch.as_tensor(made[key], dtype=torch.float32) for key in ("x", "x_test")])
    labels = torch.cat([torch.as_tensor(made[key], dtype=torch.int64) for key in ("y", "y_test")])
    return Data("mnist1d", inputs.unsqueeze(1), labels, len(made["y_test"]), _SHARE_1D)


def _torchvision(name: str, root: Path) -> Data:
    from torchvision import datasets

    if name == "svhn":
        parts = [datasets.SVHN(root, split=part) for part in ("train", "test")]
        images = [torch.as_tensor(part.data) for part in parts]
        labels = [torch.as_tensor(part.labels) for part in parts]
    else:
        kind = getattr(datasets, TORCHVISION[name])
        parts = [kind(root, train=part) for part in (True, False)]
        images = [torch.as_tensor(part.data).movedim(-1, 1) for part in parts]
        labels = [torch.as_tensor(part.targets) for part in parts]
    pixels = torch.cat(images).float() / 255
    # Test images decide nothing, not even how images are scaled.
    known = pixels[: len(labels[0])]
    mean, std = known.mean((0, 2, 3), keepdim=True), known.std((0, 2, 3), keepdim=True)
    return Data(name, (pixels - mean) / std, torch.cat(labels).long(), official=len(labels[1]))
