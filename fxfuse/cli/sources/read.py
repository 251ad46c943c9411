"""From what a user wrote to examples."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxfuse.cli.sources.arrays import read_arrays
from fxfuse.cli.sources.data import Data, Preparation, spread
from fxfuse.cli.sources.datasets import hugging_face, torchvision_dataset
from fxfuse.cli.sources.images import image_folder
from fxfuse.cli.sources.pairs import joined, pair
from fxfuse.cli.zoo import import_object
from fxfuse.errors import FxfuseError, InputError
from fxfuse.members.checkpoint import TORCH_SUFFIXES, read_file

_ARRAYS, _TEXT = (".npy", ".npz"), ".txt"
#: Files that are read, whatever else is in their names.
_SUFFIXES = (*_ARRAYS, _TEXT, ".safetensors", *TORCH_SUFFIXES)
#: Sources that a prefix names.
_NAMED: dict[str, Callable[[str, Preparation], Data]] = {
    "torchvision": torchvision_dataset,
    "datasets": hugging_face,
}


def read_data(spec: str, prepare: Preparation | None = None) -> Data:
    """Read examples.

    Args:
        spec: A `.npy`, `.npz`, `.safetensors` or weights-only `.pt` file with inputs, or with
            `inputs` and `labels`; a `.txt` file with one text per line; a folder of images, or with
            one folder of them for each class; `torchvision:CLASS:ROOT` or
            `torchvision:CLASS:ROOT:SPLIT`, a data set that is on disk (SPLIT: `test`, the default,
            or `train`); `datasets:FOLDER`, what `save_to_disk` of Hugging Face datasets wrote; or
            `package.module:function`, which returns such inputs, a pair (inputs, labels), or an
            iterable of batches of either kind.
        prepare: What is done to them; None: nothing.

    Raises:
        InputError: There is nothing of that name, it holds no examples, or they do not fit
            together.
        CheckpointError: A file is damaged.
        CheckpointError: A `.pt` file holds other objects than tensors.
        MissingDependencyError: The source needs a package that is not installed.
        OptionError: The function cannot be imported.
    """
    prepare = prepare or Preparation()
    kind, _, rest = spec.partition(":")
    if kind in _NAMED and rest:
        data = _NAMED[kind](rest, prepare)
    elif Path(spec).is_dir():
        data = image_folder(Path(spec), prepare)
    elif Path(spec).suffix in _ARRAYS:
        data = _numpy(Path(spec), prepare.limit)
    elif is_text(spec):
        data = _texts(Path(spec), prepare)
    elif Path(spec).suffix in _SUFFIXES:
        data = pair(read_file(spec), spec)
    elif is_function(spec):
        data = _function(spec, prepare.limit)
    else:
        raise InputError(
            f"the data cannot be read: {spec!r}",
            where=spec,
            why="it is not a folder, a file of a known format, or module:function",
            how="use a .npy, .npz, .safetensors, .pt or .txt file, a folder of images, or with one "
            "for each class, torchvision:CLASS:ROOT, datasets:FOLDER, or module:function",
        )
    return _limited(_checked(data, spec), prepare.limit)


def is_text(spec: str) -> bool:
    """Tell whether a source holds texts."""
    return Path(spec).suffix == _TEXT


def is_function(spec: str) -> bool:
    """Tell whether `read_data` would import a function for a source, unless it is a folder."""
    kind, _, rest = spec.partition(":")
    known = (kind in _NAMED and rest) or Path(spec).suffix in _SUFFIXES
    return ":" in spec and not known


def absolute(spec: str) -> str:
    """Return a source of `read_data` that is found from another working directory, too."""
    kind, _, rest = spec.partition(":")
    if kind == "datasets" and rest:
        return f"{kind}:{os.path.abspath(rest)}"
    if kind == "torchvision" and ":" in rest:
        name, _, place = rest.partition(":")
        return f"{kind}:{name}:{os.path.abspath(place)}"
    if Path(spec).exists() or ":" not in spec:
        return os.path.abspath(spec)
    return spec


def _texts(path: Path, prepare: Preparation) -> Data:
    """Read one text from each line that is not empty."""
    if prepare.tokens is None:
        raise InputError(
            "texts need a tokenizer",
            where=str(path),
            why="the network takes numbers",
            how="use --model hf:FOLDER, whose folder holds a tokenizer",
        )
    try:
        with path.open(encoding="utf-8") as lines:
            texts = [text for line in lines if (text := line.strip())]
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path.name} cannot be read", where=str(path), why=str(error), how="save it as UTF-8"
        ) from error
    return Data(prepare.tokens(texts)) if texts else Data((torch.empty(0),))


def _numpy(path: Path, limit: int | None) -> Data:
    try:
        content = read_arrays(path, limit)
    except FxfuseError:
        raise
    # What a damaged file makes numpy, its zip reader or the decompressor say is not documented.
    except Exception as error:
        raise InputError(
            f"{path.name} cannot be read",
            where=str(path),
            why=f"{type(error).__name__}: {error}",
            how="save arrays of numbers with numpy.save or numpy.savez",
        ) from error
    return pair(content, str(path))


def _function(spec: str, limit: int | None) -> Data:
    function = import_object(spec)
    try:
        content: Any = function()
        if isinstance(content, Tensor | np.ndarray | tuple | Mapping):
            return pair(content, spec)
        return joined(content, spec, limit)
    except FxfuseError:
        raise
    # The user's function may raise anything.
    except Exception as error:
        raise InputError(
            f"{spec} returns no data",
            where=spec,
            why=f"{type(error).__name__}: {error}",
            how="return inputs, a pair (inputs, labels), or an iterable of batches",
        ) from error


def _checked(data: Data, where: str) -> Data:
    sizes = {len(x) if x.dim() else 0 for x in data.inputs}
    sizes |= set() if data.labels is None else {len(data.labels)}
    if len(sizes) > 1 or 0 in sizes:
        raise InputError(
            "inputs and labels differ in length" if len(sizes) > 1 else "there are no examples",
            where=where,
            why=f"their lengths are {', '.join(map(str, sorted(sizes)))}",
            how="use as many labels as inputs, along the first dimension",
        )
    return data


def _limited(data: Data, limit: int | None) -> Data:
    if limit is None or len(data) <= limit:
        return data
    chosen = spread(len(data), limit)
    labels = None if data.labels is None else data.labels[chosen]
    return Data(tuple(x[chosen] for x in data.inputs), labels)
