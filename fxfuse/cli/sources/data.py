"""Examples, and what is done to them before a network sees them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxfuse.errors import InputError


@dataclass(frozen=True)
class Preparation:
    """What is done to data before a network sees them.

    Attributes:
        limit: So many examples are taken, spread evenly over the source: data are often sorted.
        size: Height and width that images of a folder or a data set are resized to.
        mean: For each channel, subtracted from images in [0, 1].
        std: For each channel, by which they are divided then.
    """

    limit: int | None = None
    size: tuple[int, int] | None = None
    mean: Sequence[float] = ()
    std: Sequence[float] = ()


@dataclass(frozen=True)
class Data:
    """Examples.

    Attributes:
        inputs: The network's positional inputs, each [n, ...].
        labels: int64 [n], or None where there are none.
    """

    inputs: tuple[Tensor, ...]
    labels: Tensor | None = None

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.inputs[0])

    def require_labels(self, where: str) -> Tensor:
        """Return the labels, or raise an error where there are none."""
        if self.labels is None:
            raise InputError(
                "the data have no labels",
                where=where,
                why="accuracy and fine-tuning need them",
                how="use a source with labels: a file with both, a folder for each class, or a "
                "function that returns pairs (inputs, labels)",
            )
        return self.labels


def spread(count: int, limit: int | None) -> Tensor:
    """Numbers of the examples that are taken, evenly spread: data are often sorted by class."""
    if limit is None or count <= limit:
        return torch.arange(count)
    return torch.arange(limit) * count // limit
