"""Images of folders and of data sets, as tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxfuse.cli.sources.data import Data, Preparation, spread
from fxfuse.errors import InputError, MissingDependencyError

#: Lets the first dimension of an image be its channels.
_CHANNELS_FIRST = (2, 0, 1)


def image_folder(path: Path, prepare: Preparation) -> Data:
    """Read images of a folder with a folder for each class, in the order of their names."""
    datasets = torchvision_datasets()
    try:
        folder = datasets.ImageFolder(str(path))
    except FileNotFoundError as error:
        raise InputError(
            f"{path.name} is not a folder of images",
            where=str(path),
            why=str(error),
            how="put the images of each class into one subfolder",
        ) from error
    return images(folder, str(path), prepare)


def images(pairs: Any, where: str, prepare: Preparation) -> Data:
    """Return pairs (PIL image, class) as tensors."""
    read, labels = [], []
    for index in spread(len(pairs), prepare.limit).tolist():
        image, label = pairs[index]
        read.append(_image(image, prepare))
        labels.append(int(label))
    if len({image.shape for image in read}) > 1:
        raise InputError(
            "the images differ in size",
            where=where,
            why=", ".join(sorted({str(list(image.shape)) for image in read})[:3]),
            how="set a size to resize them to, such as 224,224",
        )
    if not read:
        raise InputError(
            "there are no images", where=where, how="use a folder or data set with images"
        )
    return Data((torch.stack(read),), torch.tensor(labels, dtype=torch.int64))


def _image(image: Any, prepare: Preparation) -> Tensor:
    if prepare.size is not None and hasattr(image, "resize"):
        height, width = prepare.size
        image = image.resize((width, height))
    values = np.asarray(image)
    values = values[..., None] if values.ndim == 2 else values
    pixels = torch.as_tensor(values.transpose(_CHANNELS_FIRST).copy()).to(torch.float32) / 255
    for given, change in ((prepare.mean, torch.sub), (prepare.std, torch.div)):
        if given:
            if len(given) not in (1, len(pixels)):
                raise InputError(
                    f"mean and std need 1 or {len(pixels)} values, got {len(given)}",
                    why=f"the images have {len(pixels)} channels",
                    how="set one value for each channel",
                )
            pixels = change(pixels, torch.tensor(list(given)).reshape(-1, 1, 1))
    return pixels


def torchvision_datasets() -> Any:
    """Return the module of torchvision's data sets."""
    try:
        from torchvision import datasets
    except ImportError as error:
        raise MissingDependencyError(
            "images need torchvision", why=str(error), how='pip install "fxfuse[vision]"'
        ) from error
    return datasets
