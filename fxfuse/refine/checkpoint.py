"""Checkpoints of a training run: one safetensors file, written atomically, never a pickle.

A checkpoint is a tree of dicts, lists and tuples with tensors and scalars at its leaves. The
tensors become the tensors of the safetensors file; the tree itself, with its scalars, is JSON in
the header. One file rather than two, so that replacing it is atomic.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fxfuse.common.output import atomic_file
from fxfuse.errors import CheckpointError

_HEADER = "fxfuse.refine"
_SCALARS = (str, int, float, bool, type(None))


def checkpoint_file(path: str | os.PathLike[str]) -> Path:
    """Return the file that a checkpoint at `path` lives in: `path`, or a file in that folder."""
    path = Path(path)
    return path / "refine.safetensors" if path.is_dir() else path


def save(path: Path, tree: dict[str, Any]) -> None:
    """Write `tree` to `path`; a crash at any moment leaves the old file or the new one.

    Args:
        path: The file; missing parent folders are made.
        tree: Nested dicts (keys str or int), lists and tuples of tensors and scalars.
    """
    tensors: dict[str, torch.Tensor] = {}
    header = {_HEADER: json.dumps(_encode(tree, "", tensors))}
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as work:
        save_file(tensors, work, metadata=header)
        with work.open("rb+") as written:
            os.fsync(written.fileno())


def load(path: Path) -> dict[str, Any]:
    """Read back what `save` wrote, with all tensors on the CPU."""
    try:
        with safe_open(path, framework="pt") as file:
            # Cloned: they are views of the file, which the next checkpoint replaces.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            header = json.loads((file.metadata() or {})[_HEADER])
        tree = _decode(header, tensors)
    except (SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(
            "the training checkpoint cannot be read",
            where=str(path),
            why=f"{type(error).__name__}: {error}",
            how="delete the file to start over, or pass the path of another checkpoint",
        ) from error
    return dict(tree)


def _encode(value: Any, where: str, tensors: dict[str, torch.Tensor]) -> Any:
    """Return `value` as JSON, moving its tensors into `tensors` under their path in the tree."""
    if isinstance(value, torch.Tensor):
        # Own memory each: safetensors refuses tied tensors, and loading a module ties them again.
        tensors[where] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": where}
    if isinstance(value, dict):
        return {"dict": [[k, _encode(v, f"{where}/{k}", tensors)] for k, v in value.items()]}
    if isinstance(value, (list, tuple)):
        items = [_encode(item, f"{where}/{i}", tensors) for i, item in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": items}
    if isinstance(value, _SCALARS):
        return value
    raise CheckpointError(
        f"a {type(value).__name__} cannot be stored in a checkpoint",
        where=where.lstrip("/"),
        why="a checkpoint holds tensors, numbers and strings only, so that loading it runs no code",
        how="use an optimiser and schedule whose state is tensors and scalars, or no checkpoint",
    )


def _decode(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _decode(item, tensors) for key, item in content}
    items = [_decode(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items
