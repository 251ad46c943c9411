"""Data sets of libraries that are on disk."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fxfuse.cli.sources.data import Data, Preparation, spread
from fxfuse.cli.sources.images import decoded, images, torchvision_datasets
from fxfuse.cli.sources.pairs import INPUTS, LABELS
from fxfuse.errors import InputError, MissingDependencyError


def torchvision_dataset(rest: str, prepare: Preparation) -> Data:
    """Read examples of `CLASS:ROOT` or `CLASS:ROOT:SPLIT`; nothing is downloaded."""
    datasets = torchvision_datasets()
    name, _, place = rest.partition(":")
    root, split = place, "test"
    for known in ("train", "test"):
        if place.endswith(f":{known}"):
            root, split = place[: -len(known) - 1], known
    kind = getattr(datasets, name, None)
    if not isinstance(kind, type) or not root:
        raise InputError(
            f"torchvision has no data set {name!r}" if root else "the folder is missing",
            where=f"torchvision:{rest}",
            how="write it like torchvision:CIFAR10:/data or torchvision:CIFAR10:/data:train",
        )
    first: Exception | None = None
    # Data sets of torchvision name their parts in one of two ways.
    for arguments in ({"train": split == "train"}, {"split": split}):
        try:
            return images(kind(root, download=False, **arguments), f"{name} in {root}", prepare)
        except TypeError as error:
            first = first or error
        except (RuntimeError, OSError) as error:
            first = error
            break
    raise InputError(
        f"{name} cannot be read",
        where=root,
        why=str(first),
        how="copy the data set there; nothing is downloaded",
    ) from first


def hugging_face(folder: str, prepare: Preparation) -> Data:
    """Read a folder that `save_to_disk` wrote; of several splits, `test` or the first."""
    try:
        import datasets
    except ImportError as error:
        raise MissingDependencyError(
            "Hugging Face datasets is not installed",
            where=f"datasets:{folder}",
            why=str(error),
            how='pip install "fxfuse[datasets]"',
        ) from error
    try:
        table = datasets.load_from_disk(folder)
    # Its errors are of many kinds.
    except Exception as error:
        raise InputError(
            f"{folder} holds no data set",
            where=folder,
            why=f"{type(error).__name__}: {error}",
            how="use a folder that save_to_disk wrote",
        ) from error
    if isinstance(table, Mapping):
        table = table["test"] if "test" in table else next(iter(table.values()))
    columns = list(table.column_names)
    image = next((c for c in ("image", "img") if c in columns), None)
    label = next((c for c in LABELS if c in columns), None)
    if image and label:
        if isinstance(table.features[image], datasets.Image):
            # They are decoded after a check of their size.
            table = table.cast_column(image, datasets.Image(decode=False))
        return images(_Rows(table, image, label), folder, prepare)
    table = table.with_format("torch")
    found = next((c for c in ("input_ids", *INPUTS) if c in columns), None)
    if found is None:
        raise InputError(
            "the data set has no column of inputs",
            where=folder,
            why=f"its columns are {', '.join(columns)}",
            how="rename the column of the inputs to input_ids, inputs or image",
        )
    chosen = table.select(spread(len(table), prepare.limit).tolist())
    whole = {name: torch.as_tensor(chosen[:][name]) for name in (found, label) if name}
    return Data((whole[found],), whole[label].to(torch.int64) if label else None)


@dataclass(frozen=True)
class _Rows:
    """A table of images as pairs."""

    table: Any
    image: str
    label: str

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        row = self.table[index]
        image = row[self.image]
        if isinstance(image, Mapping):
            from PIL import ImageOps

            # As the library does; but a path alone could be any file.
            image = ImageOps.exif_transpose(decoded(io.BytesIO(image["bytes"] or b"")))
        return image, row[self.label]
