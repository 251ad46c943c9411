"""CIFAR-10 as tensors: from a JPEG copy of its images, or from torchvision's own files.

`<data root>/cifar10/{train,test}.npz` hold `jpeg` (uint8, all files one after the other), `offsets`
(int64, n + 1) and `labels` (uint8). JPEG is lossy, so accuracies differ a little from those on the
original images.

Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
"""

from __future__ import annotations

import functools
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

CLASSES = 10
# Training images, chosen at random once, that no member sees: for calibration and validation.
HELD_OUT = 5000
# The mean and deviation of each colour of the training images, between 0 and 1.
_MEAN = torch.tensor([0.4914, 0.4822, 0.4465]).view(3, 1, 1)
_DEVIATION = torch.tensor([0.2470, 0.2435, 0.2616]).view(3, 1, 1)


@dataclass(frozen=True)
class Images:
    """Normalised images `[n, 3, 32, 32]`, float32, and their classes `[n]`, int64."""

    inputs: Tensor
    labels: Tensor

    def where(self, kept: Tensor) -> Images:
        """Return the images at some positions, given as indices or as a mask `[n]`."""
        return Images(self.inputs[kept], self.labels[kept])


@dataclass(frozen=True)
class Cifar10:
    """The images that train members, those that none of them saw, and the official test set."""

    train: Images
    held_out: Images
    test: Images

    def calibration(self, n: int, seed: int) -> Tensor:
        """Return a random sample `[n, 3, 32, 32]` of the first 4,000 images that were held out."""
        order = torch.randperm(HELD_OUT - 1000, generator=torch.Generator().manual_seed(seed))
        return self.held_out.inputs[order[:n]]

    def validation(self) -> Images:
        """Return the last 1,000 images that were held out, for choices between methods."""
        return self.held_out.where(torch.arange(HELD_OUT - 1000, HELD_OUT))


@functools.cache
def load(data_root: Path) -> Cifar10:
    """Read CIFAR-10 from a folder.

    Args:
        data_root: The folder that holds `cifar10/train.npz`, or torchvision's
            `cifar-10-batches-py`.

    Raises:
        FileNotFoundError: It holds neither.
    """
    if (data_root / "cifar10" / "train.npz").exists():
        known, test = (_from_jpeg(data_root / "cifar10" / f"{n}.npz") for n in ("train", "test"))
    elif (data_root / "cifar-10-batches-py").exists():
        known, test = (_from_torchvision(data_root, train=train) for train in (True, False))
    else:
        raise FileNotFoundError(
            f"{data_root} holds neither cifar10/train.npz nor torchvision's cifar-10-batches-py. "
            "Nothing is downloaded: give the folder that has one of them with --data-root."
        )
    # Files may hold one class after the other.
    order = torch.randperm(len(known.labels), generator=torch.Generator().manual_seed(0))
    train, held_out = order[:-HELD_OUT], order[-HELD_OUT:]
    return Cifar10(known.where(train), known.where(held_out), test)


def _from_jpeg(path: Path) -> Images:
    with np.load(path) as content:
        jpeg, offsets, labels = content["jpeg"], content["offsets"], content["labels"]
    pixels = np.empty((len(labels), 32, 32, 3), np.uint8)
    for i in range(len(labels)):
        pixels[i] = np.asarray(Image.open(io.BytesIO(jpeg[offsets[i] : offsets[i + 1]].tobytes())))
    return _normalised(pixels, labels)


def _from_torchvision(root: Path, *, train: bool) -> Images:
    from torchvision.datasets import CIFAR10

    found = CIFAR10(root, train=train)
    return _normalised(found.data, np.asarray(found.targets))


def _normalised(pixels: np.ndarray, labels: np.ndarray) -> Images:
    inputs = torch.from_numpy(pixels).movedim(-1, 1).float() / 255
    return Images(
        ((inputs - _MEAN) / _DEVIATION).contiguous(), torch.from_numpy(labels.astype(np.int64))
    )
