"""Data for calibration and evaluation, from where users keep it: files, folders, data sets."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxfuse.checkpoint import TORCH_SUFFIXES, read_file
from fxfuse.errors import DataError, FxfuseError, MissingDependencyError
from fxfuse.zoo import import_object

#: Names under which files hold inputs and labels, the usual ones first.
_INPUTS, _LABELS = ("inputs", "images", "x", "data"), ("labels", "targets", "y", "label")
#: Lets the first dimension of an image be its channels.
_CHANNELS_FIRST = (2, 0, 1)


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
        """Number of examples."""
        return len(self.inputs[0])

    def require_labels(self, where: str) -> Tensor:
        """The labels.

        Raises:
            DataError: There are none.
        """
        if self.labels is None:
            raise DataError(
                "the data have no labels",
                where=where,
                why="accuracy and fine-tuning need them",
                how="use a source with labels: a file with both, a folder for each class, or a "
                "function that returns pairs",
            )
        return self.labels


def read_data(spec: str, prepare: Preparation | None = None) -> Data:
    """Reads examples.

    Args:
        spec: A `.npy`, `.npz`, `.safetensors` or weights-only `.pt` file with inputs, or with
            `inputs` and `labels`; a folder with one folder of images for each class;
            `torchvision:CLASS:ROOT` or `torchvision:CLASS:ROOT:SPLIT`, a data set that is on disk
            (SPLIT: `test`, the default, or `train`); `datasets:FOLDER`, what `save_to_disk` of
            Hugging Face datasets wrote; or `package.module:function`, which returns such inputs, a
            pair (inputs, labels), or an iterable of batches of either kind.
        prepare: What is done to them; None: nothing.

    Raises:
        DataError: There is nothing of that name, it holds no examples, or they do not fit
            together.
        CheckpointCorruptError: A file is damaged.
        CheckpointPickleError: A `.pt` file holds other objects than tensors.
        MissingDependencyError: The source needs a package that is not installed.
        ModelFactoryError: The function cannot be imported.
    """
    prepare = prepare or Preparation()
    kind, _, rest = spec.partition(":")
    if kind in _NAMED and rest:
        data = _NAMED[kind](rest, prepare)
    elif Path(spec).is_dir():
        data = _image_folder(Path(spec), prepare)
    elif Path(spec).suffix in (".npy", ".npz"):
        data = _numpy(Path(spec))
    elif Path(spec).suffix in (".safetensors", *TORCH_SUFFIXES):
        data = _pair(read_file(spec), spec)
    elif ":" in spec:
        data = _function(spec, prepare.limit)
    else:
        raise DataError(
            f"the data cannot be read: {spec!r}",
            where=spec,
            why="it is no folder, no file of a known format, and no module:function",
            how="name a .npy, .npz, .safetensors or .pt file, a folder with one folder of images "
            "for each class, torchvision:CLASS:ROOT, datasets:FOLDER, or module:function",
        )
    return _limited(_checked(data, spec), prepare.limit)


def absolute(spec: str) -> str:
    """A source that is found from another working directory, too.

    Args:
        spec: As `read_data` takes it.
    """
    kind, _, rest = spec.partition(":")
    if kind == "datasets" and rest:
        return f"{kind}:{os.path.abspath(rest)}"
    if kind == "torchvision" and ":" in rest:
        name, _, place = rest.partition(":")
        return f"{kind}:{name}:{os.path.abspath(place)}"
    if Path(spec).exists() or ":" not in spec:
        return os.path.abspath(spec)
    # Where the module of a function is looked for.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    return spec


def _numpy(path: Path) -> Data:
    try:
        # Arrays of objects would be unpickled.
        content = np.load(path, allow_pickle=False)
        arrays = content if isinstance(content, np.ndarray) else {k: content[k] for k in content}
    # What a damaged file makes numpy, its zip reader or the decompressor say is not documented.
    except Exception as error:
        raise DataError(
            f"{path.name} cannot be read",
            where=str(path),
            why=f"{type(error).__name__}: {error}",
            how="save arrays of numbers with numpy.save or numpy.savez",
        ) from error
    return _pair(arrays, str(path))


def _pair(content: Any, where: str) -> Data:
    """Examples of a file's content, or of what a function returned in one piece."""
    if isinstance(content, Mapping):
        inputs = next((content[name] for name in _INPUTS if name in content), None)
        labels = next((content[name] for name in _LABELS if name in content), None)
        if inputs is None and len(content) == 1:
            inputs = next(iter(content.values()))
        if inputs is None:
            raise DataError(
                "the inputs are not found",
                where=where,
                why=f"it holds {', '.join(map(repr, list(content)[:5]))}",
                how="name them inputs and labels",
            )
        return Data(_tensors(inputs, where), None if labels is None else _labels(labels, where))
    if isinstance(content, tuple | list) and len(content) == 2 and _is_labels(content[1]):
        return Data(_tensors(content[0], where), _labels(content[1], where))
    return Data(_tensors(content, where))


def _tensors(value: Any, where: str) -> tuple[Tensor, ...]:
    parts = value if isinstance(value, tuple | list) else (value,)
    if not parts or not all(isinstance(part, Tensor | np.ndarray) for part in parts):
        raise DataError(
            "the inputs are no tensors",
            where=where,
            why=f"they are {type(value).__name__}",
            how="give one tensor [n, ...], or a tuple of them for several inputs",
        )
    try:
        return tuple(torch.as_tensor(part) for part in parts)
    # Texts and times have no dtype in torch.
    except TypeError as error:
        raise DataError("the inputs are no numbers", where=where, why=str(error)) from error


def _is_labels(value: Any) -> bool:
    """Whether the second of two tensors is class numbers, and not another input."""
    if not isinstance(value, Tensor | np.ndarray) or value.ndim != 1:
        return False
    return not torch.as_tensor(value).is_floating_point()


def _labels(value: Any, where: str) -> Tensor:
    found = torch.as_tensor(value)
    whole = not found.is_floating_point() and not found.is_complex()
    if found.dim() != 1 or not whole:
        raise DataError(
            "the labels are no class numbers",
            where=where,
            why=f"they are {found.dtype} of shape {list(found.shape)}",
            how="give integers [n], counted from 0",
        )
    return found.to(torch.int64)


def _function(spec: str, limit: int | None) -> Data:
    function = import_object(spec)
    try:
        content: Any = function()
        if isinstance(content, Tensor | np.ndarray | tuple | Mapping):
            return _pair(content, spec)
        return _joined(content, spec, limit)
    except FxfuseError:
        raise
    # The user's function may raise anything.
    except Exception as error:
        raise DataError(
            f"{spec} gives no data",
            where=spec,
            why=f"{type(error).__name__}: {error}",
            how="let it return inputs, a pair (inputs, labels), or an iterable of batches",
        ) from error


def _joined(batches: Iterable[Any], where: str, limit: int | None) -> Data:
    """The first examples of an iterable of batches."""
    found: list[Data] = []
    for batch in batches:
        # A list of two is what a DataLoader makes of a pair.
        found.append(_pair(tuple(batch) if isinstance(batch, list) else batch, where))
        if limit is not None and sum(map(len, found)) >= limit:
            break
    if not found:
        raise DataError("there are no batches", where=where, why="the iterable is empty")
    inputs = tuple(torch.cat(parts) for parts in zip(*(d.inputs for d in found), strict=True))
    labels = [d.labels for d in found if d.labels is not None]
    return Data(inputs, torch.cat(labels) if len(labels) == len(found) else None)


def _image_folder(path: Path, prepare: Preparation) -> Data:
    datasets = _torchvision_datasets()
    try:
        folder = datasets.ImageFolder(str(path))
    except FileNotFoundError as error:
        raise DataError(
            f"{path.name} is no folder of images",
            where=str(path),
            why=str(error),
            how="put the images of each class into a folder of their own in it",
        ) from error
    return _images(folder, str(path), prepare)


def _torchvision_dataset(rest: str, prepare: Preparation) -> Data:
    datasets = _torchvision_datasets()
    name, _, place = rest.partition(":")
    root, split = place, "test"
    for known in ("train", "test"):
        if place.endswith(f":{known}"):
            root, split = place[: -len(known) - 1], known
    kind = getattr(datasets, name, None)
    if not isinstance(kind, type) or not root:
        raise DataError(
            f"torchvision has no data set {name!r}" if root else "the folder is missing",
            where=f"torchvision:{rest}",
            how="write it like torchvision:CIFAR10:/data or torchvision:CIFAR10:/data:train",
        )
    first: Exception | None = None
    # Data sets of torchvision name their parts in one of two ways.
    for arguments in ({"train": split == "train"}, {"split": split}):
        try:
            return _images(kind(root, download=False, **arguments), f"{name} in {root}", prepare)
        except TypeError as error:
            first = first or error
        except (RuntimeError, OSError) as error:
            first = error
            break
    raise DataError(
        f"{name} cannot be read",
        where=root,
        why=str(first),
        how="put the data set there; nothing is downloaded",
    ) from first


def _hugging_face(folder: str, prepare: Preparation) -> Data:
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
        raise DataError(
            f"{folder} holds no data set",
            where=folder,
            why=f"{type(error).__name__}: {error}",
            how="name a folder that save_to_disk wrote",
        ) from error
    if isinstance(table, Mapping):
        table = table["test"] if "test" in table else next(iter(table.values()))
    columns = list(table.column_names)
    image = next((c for c in ("image", "img") if c in columns), None)
    label = next((c for c in _LABELS if c in columns), None)
    rows = _Rows(table, image, label) if image and label else None
    if rows is not None:
        return _images(rows, folder, prepare)
    table = table.with_format("torch")
    found = next((c for c in ("input_ids", *_INPUTS) if c in columns), None)
    if found is None:
        raise DataError(
            "the inputs are not found",
            where=folder,
            why=f"the data set has the columns {', '.join(columns)}",
            how="name the column of the inputs input_ids, inputs or image",
        )
    chosen = table.select(_spread(len(table), prepare.limit).tolist())
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
        return row[self.image], row[self.label]


def _images(pairs: Any, where: str, prepare: Preparation) -> Data:
    """Pairs (PIL image, class) as tensors."""
    images, labels = [], []
    for index in _spread(len(pairs), prepare.limit).tolist():
        image, label = pairs[index]
        images.append(_image(image, prepare))
        labels.append(int(label))
    if len({image.shape for image in images}) > 1:
        raise DataError(
            "the images differ in size",
            where=where,
            why=", ".join(sorted({str(list(image.shape)) for image in images})[:3]),
            how="give a size that they are resized to, such as 224,224",
        )
    if not images:
        raise DataError("there are no images", where=where)
    return Data((torch.stack(images),), torch.tensor(labels, dtype=torch.int64))


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
                raise DataError(
                    f"there are {len(given)} means or deviations for {len(pixels)} channels",
                    how="give one for each channel",
                )
            pixels = change(pixels, torch.tensor(list(given)).reshape(-1, 1, 1))
    return pixels


def _torchvision_datasets() -> Any:
    try:
        from torchvision import datasets
    except ImportError as error:
        raise MissingDependencyError(
            "images need torchvision", why=str(error), how='pip install "fxfuse[vision]"'
        ) from error
    return datasets


def _checked(data: Data, where: str) -> Data:
    sizes = {len(x) if x.dim() else 0 for x in data.inputs}
    sizes |= set() if data.labels is None else {len(data.labels)}
    if len(sizes) > 1 or 0 in sizes:
        raise DataError(
            "inputs and labels do not fit together" if len(sizes) > 1 else "there are no examples",
            where=where,
            why=f"their numbers are {', '.join(map(str, sorted(sizes)))}",
            how="give as many labels as inputs, along the first dimension",
        )
    return data


def _limited(data: Data, limit: int | None) -> Data:
    if limit is None or len(data) <= limit:
        return data
    chosen = _spread(len(data), limit)
    labels = None if data.labels is None else data.labels[chosen]
    return Data(tuple(x[chosen] for x in data.inputs), labels)


def _spread(count: int, limit: int | None) -> Tensor:
    """Numbers of the examples that are taken, evenly spread: data are often sorted by class."""
    if limit is None or count <= limit:
        return torch.arange(count)
    return torch.arange(limit) * count // limit


_NAMED: dict[str, Callable[[str, Preparation], Data]] = {
    "torchvision": _torchvision_dataset,
    "datasets": _hugging_face,
}
