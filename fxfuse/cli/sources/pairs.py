"""Inputs and labels, as files and functions hold them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxfuse.cli.sources.data import Data
from fxfuse.errors import InputError

#: Names under which files hold inputs and labels, the usual ones first.
INPUTS, LABELS = ("inputs", "images", "x", "data"), ("labels", "targets", "y", "label")


def pair(content: Any, where: str) -> Data:
    """Return the examples of a file's content, or of what a function returned in one piece."""
    if isinstance(content, Mapping):
        inputs = next((content[name] for name in INPUTS if name in content), None)
        labels = next((content[name] for name in LABELS if name in content), None)
        if inputs is None and len(content) == 1:
            inputs = next(iter(content.values()))
        if inputs is None:
            raise InputError(
                "there are no inputs",
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
        raise InputError(
            "the inputs are not tensors",
            where=where,
            why=f"they are {type(value).__name__}",
            how="use one tensor [n, ...], or a tuple of them for several inputs",
        )
    try:
        return tuple(torch.as_tensor(part) for part in parts)
    # Texts and times have no dtype in torch.
    except TypeError as error:
        raise InputError(
            "the inputs are not numbers",
            where=where,
            why=str(error),
            how="use arrays of numbers",
        ) from error


def _is_labels(value: Any) -> bool:
    """Tell whether the second of two tensors is class numbers, and not another input."""
    if not isinstance(value, Tensor | np.ndarray) or value.ndim != 1:
        return False
    return not torch.as_tensor(value).is_floating_point()


def _labels(value: Any, where: str) -> Tensor:
    found = torch.as_tensor(value)
    whole = not found.is_floating_point() and not found.is_complex()
    if found.dim() != 1 or not whole:
        raise InputError(
            "the labels are not class numbers",
            where=where,
            why=f"they are {found.dtype} of shape {list(found.shape)}",
            how="use integers [n], counted from 0",
        )
    return found.to(torch.int64)


def joined(batches: Iterable[Any], where: str, limit: int | None) -> Data:
    """Return the first examples of an iterable of batches."""
    found: list[Data] = []
    for batch in batches:
        # A list of two is what a DataLoader makes of a pair.
        found.append(pair(tuple(batch) if isinstance(batch, list) else batch, where))
        if limit is not None and sum(map(len, found)) >= limit:
            break
    if not found:
        raise InputError(
            "there are no batches",
            where=where,
            why="the iterable is empty",
            how="return a new iterable in every call",
        )
    inputs = tuple(torch.cat(parts) for parts in zip(*(d.inputs for d in found), strict=True))
    labels = [d.labels for d in found if d.labels is not None]
    return Data(inputs, torch.cat(labels) if len(labels) == len(found) else None)
