"""What one repetition of the demo is made of: its images, by what they are used for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fxfuse.cli.data import Batches, Split, specialist_indices, split

MEMBERS = 4
SETTINGS = ("same data, different seeds", "specialists")
BATCH = 64

# As many as `fxfuse.fuse` takes.
CALIBRATION = 1000

_SHARE_OF_OTHERS = 0.1


@dataclass(frozen=True)
class Repetition:
    """One seed of one setting.

    Attributes:
        setting: One of `SETTINGS`.
        seed: Decides the split, the members' first weights and all batches.
        images: Of all parts, float32 `[n, 1, 28, 28]`.
        labels: int64 `[n]`.
    """

    setting: str
    seed: int
    images: Tensor
    labels: Tensor
    parts: Split

    @classmethod
    def of(cls, setting: str, seed: int, images: Tensor, labels: Tensor) -> Repetition:
        """Split the images."""
        return cls(setting, seed, images, labels, split(labels, seed))

    @property
    def validation(self) -> tuple[Tensor, Tensor]:
        """Images and labels that choose."""
        return self.images[self.parts.val], self.labels[self.parts.val]

    @property
    def test(self) -> tuple[Tensor, Tensor]:
        """Images and labels that are reported, once."""
        return self.images[self.parts.test], self.labels[self.parts.test]

    def calibration(self) -> Tensor:
        """Return the training images `[c, 1, 28, 28]` for all that needs no labels.

        Drawn at random, since the training images are sorted by class.
        """
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(self.parts.train), generator=generator)
        return self.images[self.parts.train[order[:CALIBRATION]]]

    def training(self) -> Batches:
        """Return the batches of all training images with labels."""
        train = self.parts.train
        return Batches(self.images[train], self.labels[train], BATCH, seed=self.seed)

    def batches_of_member(self, index: int) -> Batches:
        """Return the batches of the training images that member `index` sees."""
        seen = self._seen_by(index)
        return Batches(self.images[seen], self.labels[seen], BATCH, seed=self.seed_of(index))

    def seed_of(self, index: int) -> int:
        """Return a seed of its own for each member of each repetition."""
        return 100 * self.seed + index

    def _seen_by(self, index: int) -> Tensor:
        if self.setting != "specialists":
            return self.parts.train
        own = [label for label in self.labels.unique().tolist() if label % MEMBERS == index]
        generator = torch.Generator().manual_seed(self.seed_of(index))
        return specialist_indices(self.labels, self.parts.train, own, _SHARE_OF_OTHERS, generator)
