"""Examples, and what is done to them before a network sees them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fxfuse.common.options import Options
from fxfuse.errors import InputError, OptionError


@dataclass(frozen=True)
class Preparation:
    """What is done to data before a network sees them.

    Attributes:
        limit: So many examples are taken, spread evenly over the source: data are often sorted.
        size: Height and width that images of a folder or a data set are resized to.
        mean: For each channel, subtracted from images in [0, 1].
        std: For each channel, by which they are divided then.
        transform: Makes the network's input of a PIL image, in place of the fields above.
        tokens: Makes the network's inputs of texts.
    """

    limit: int | None = None
    size: tuple[int, int] | None = None
    mean: Sequence[float] = ()
    std: Sequence[float] = ()
    transform: Callable[[Any], Tensor] | None = None
    tokens: Callable[[Sequence[str]], tuple[Tensor, ...]] | None = None


#: What networks of these data sets are trained on: size, mean and deviation of each channel.
_PRESETS: dict[str, tuple[tuple[int, int] | None, Sequence[float], Sequence[float]]] = {
    "imagenet": ((224, 224), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar": ((32, 32), (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)),
}


@dataclass(frozen=True)
class Images(Options):
    """What is done to images of a folder or a data set before a network sees them.

    Attributes:
        preset: The size, mean and deviation of ImageNet (224 x 224) or CIFAR-10 (32 x 32); what is
            given beside it counts instead. `none` leaves images in [0, 1]. Left out: what timm or
            the folder's image processor does, for `timm:` and `hf:` networks, else nothing.
        size: Height and width that images are resized to.
        mean: For each channel, subtracted from pixels in [0, 1].
        std: For each channel, by which they are divided then.
    """

    preset: Literal["imagenet", "cifar", "none"] | None = None
    size: tuple[int, int] | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Check the numbers."""
        super().__post_init__()
        if self.size is not None and (len(list(self.size)) != 2 or min(self.size) < 1):
            raise OptionError(
                f"size must be a height and a width, got {list(self.size)}",
                where="size",
                how="pass two positive numbers, such as 224, 224",
            )
        if any(not deviation > 0 for deviation in self.std):
            raise OptionError(
                f"std must be positive, got {list(self.std)}",
                where="std",
                how="pass the standard deviation of each channel",
            )
        for name in ("size", "mean", "std"):
            if isinstance(value := getattr(self, name), list):
                object.__setattr__(self, name, tuple(value))

    @property
    def is_given(self) -> bool:
        """Whether anything says how images are prepared."""
        return self != Images()

    def prepared(self, limit: int | None) -> Preparation:
        """Return what is done to images, and to data of any kind: at most `limit` are taken."""
        size, mean, std = _PRESETS.get(self.preset or "", (None, (), ()))
        return Preparation(limit, self.size or size, self.mean or mean, self.std or std)


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
