"""Images of folders and of data sets, as tensors."""

from __future__ import annotations

from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from fxfuse.cli.sources.data import Data, Preparation, spread
from fxfuse.errors import InputError, MissingDependencyError

#: Most pixels of an image that is decoded, and of one for a network; most bytes of all images.
_DECODED, _PIXELS, _MOST = 1 << 25, 1 << 23, 1 << 33
#: Lets the first dimension of an image be its channels.
_CHANNELS_FIRST = (2, 0, 1)


def image_folder(path: Path, prepare: Preparation) -> Data:
    """Read the images of a folder, in the order of their names; folders in it are classes."""
    datasets = torchvision_datasets()
    suffixes = datasets.folder.IMG_EXTENSIONS
    if not any(entry.is_dir() for entry in path.iterdir()):
        files = sorted(f for f in path.iterdir() if f.suffix.lower() in suffixes)
        if files:
            # They have no labels.
            found = images(_Files(files), str(path), prepare)
            return Data(found.inputs)
    try:
        folder = datasets.ImageFolder(str(path), loader=_opened)
    except FileNotFoundError as error:
        raise InputError(
            f"{path.name} is not a folder of images",
            where=str(path),
            why=str(error),
            how="put images into it, or one folder of images for each class",
        ) from error
    return images(folder, str(path), prepare)


class _Files:
    """Images without classes."""

    def __init__(self, files: list[Path]) -> None:
        self._files = files

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return _opened(str(self._files[index])), 0


def _opened(path: str) -> Any:
    return decoded(path).convert("RGB")


def images(pairs: Any, where: str, prepare: Preparation) -> Data:
    """Return pairs (PIL image, class) as tensors."""
    read, labels = [], []
    chosen = spread(len(pairs), prepare.limit).tolist()
    for index in chosen:
        image, label = _read(pairs, index, where)
        read.append(_image(image, prepare))
        labels.append(int(label))
        if read[-1].nbytes * len(chosen) > _MOST:
            raise InputError(
                "the images are too large",
                where=where,
                why=f"they take {read[-1].nbytes * len(chosen):,} bytes, and at most {_MOST:,} "
                "are read",
                how="set a limit in a recipe, or a size to resize them to",
            )
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


def decoded(source: str | IO[bytes]) -> Any:
    """Decode an image unless it has too many pixels; `source` is its path, or an open file."""
    from PIL import Image

    with Image.open(source) as image:
        # Nothing but its header has been read.
        _check_pixels(*image.size, _DECODED)
        image.load()
        return image


def _check_pixels(width: int, height: int, most: int) -> None:
    if width * height > most:
        raise InputError(
            "an image is too large",
            why=f"it has {width:,} x {height:,} pixels, and at most {most:,} are read",
            how="make it smaller, or leave it out; a recipe can set a size to resize images to",
        )


def _read(pairs: Any, index: int, where: str) -> tuple[Any, Any]:
    try:
        image, label = pairs[index]
    # What a damaged image makes a library say is of many kinds.
    except Exception as error:
        raise InputError(
            f"image {index} cannot be read",
            where=where,
            why=" ".join(str(error).split()) or type(error).__name__,
            how="remove it, or copy it again",
        ) from error
    return image, label


def _image(image: Any, prepare: Preparation) -> Tensor:
    if prepare.transform is not None and hasattr(image, "resize"):
        return prepare.transform(image)
    if prepare.size is not None and hasattr(image, "resize"):
        height, width = prepare.size
        _check_pixels(width, height, _PIXELS)
        image = image.resize((width, height))
    values = np.asarray(image)
    values = values[..., None] if values.ndim == 2 else values
    _check_pixels(values.shape[1], values.shape[0], _PIXELS)
    pixels = torch.as_tensor(values.transpose(_CHANNELS_FIRST).copy()).to(torch.float32).div_(255)
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
