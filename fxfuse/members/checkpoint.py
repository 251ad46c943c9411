"""Reading and writing weights: `.safetensors`, or `.pt` files that hold tensors only.

Nothing here ever unpickles an object. A `.pt` file is read by torch's weights-only reader, and a
file that this reader refuses is named, not opened in another way.
"""

from __future__ import annotations

import json
import os
import pickletools
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn

from fxfuse.common.output import MARK
from fxfuse.errors import (
    CheckpointError,
)

#: Suffixes that torch.save is commonly used with.
TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
#: What stands in a file beside the tensors; other programs look for the format.
_METADATA = {"format": "pt", "note": MARK}
#: Keys under which training scripts keep the state_dict beside an optimiser or an epoch.
NESTING_KEYS = ("state_dict", "model")


def read_file(path: str | Path, *, mmap: bool = False) -> Any:
    """Read the tensors of a file onto the CPU, in whatever plain containers they are stored.

    `mmap`: tensors of a `.pt` file stay in it until they are used, where its format allows that.
    """
    path = Path(path)
    check_openable(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in TORCH_SUFFIXES:
        return _read_torch(path, mmap=mmap and zipfile.is_zipfile(path))
    raise CheckpointError(
        f"{path.name} has an unknown format",
        where=str(path),
        why=f"weights are read from .safetensors, {', '.join(TORCH_SUFFIXES)}",
        how="save the state_dict with safetensors.torch.save_file or torch.save",
    )


def read_state_dict(path: str | Path, *, mmap: bool = False) -> dict[str, torch.Tensor]:
    """Read a state_dict onto the CPU, also one that is nested under `state_dict` or `model`.

    `mmap` as in `read_file`.
    """
    content = read_file(path, mmap=mmap)
    for key in NESTING_KEYS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise _not_a_state_dict(path, f"it holds {_describe(content)}")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise _not_a_state_dict(path, f"{name!r} is {_describe(value)}")
    return dict(content)


def load_checkpoint(model: nn.Module, path: str | Path) -> None:
    """Load a checkpoint into a model, strictly, and keep the checkpoint's dtype."""
    load_tensors(model, read_state_dict(path), path)


def load_tensors(model: nn.Module, state: dict[str, torch.Tensor], path: str | Path) -> None:
    """Load the tensors of a checkpoint into a model, strictly, and keep their dtype."""
    own = model.state_dict(keep_vars=True)
    restore_tied(state, own)
    check_fit(state, own, path)
    _match_dtype(model, state, own, path)
    model.load_state_dict(state, strict=True)


def write_state_dict(path: str | Path, state: Mapping[str, torch.Tensor]) -> None:
    """Write a state_dict as `.safetensors`, every name with its own copy of a tied tensor."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    seen: set[int] = set()
    for name, value in tensors.items():
        # safetensors refuses tensors that share memory; a strict load wants every name.
        if value.untyped_storage().data_ptr() in seen:
            tensors[name] = value.clone()
        seen.add(value.untyped_storage().data_ptr())
    # The writer makes a file that only its owner can read; the user's umask is to decide that.
    path = Path(path)
    path.touch()
    mode = path.stat().st_mode
    try:
        safetensors.torch.save_file(tensors, path, metadata=_METADATA)
        _sort_metadata(path)
    except SafetensorError as error:
        raise _as_os_error(error, path) from error
    path.chmod(mode)


def _sort_metadata(path: Path) -> None:
    """Give the notes of a file one order: the writer has another one each time."""
    start, given = b'"__metadata__":', dict(_METADATA)
    one, other = (
        start + json.dumps(dict(pairs), separators=(",", ":")).encode()
        for pairs in (given.items(), reversed(given.items()))
    )
    with path.open("r+b") as file:
        head = file.read(1024)
        if other in head:
            file.seek(head.index(other))
            file.write(one)


def _as_os_error(error: SafetensorError, path: Path) -> Exception:
    """What the system said: the writer of safetensors has one class for a full disk and a fault."""
    number = re.search(r"os error (\d+)", str(error))
    if number is None:
        return error
    return OSError(int(number[1]), os.strerror(int(number[1])), str(path))


def check_openable(path: Path) -> None:
    """Check that a checkpoint can be opened."""
    try:
        with path.open("rb"):
            return
    except OSError as error:
        raise missing(path, error) from error


def missing(path: Path, error: OSError) -> CheckpointError:
    """Return the error for a checkpoint that cannot be opened."""
    return CheckpointError(
        f"cannot open the checkpoint {path.name}",
        where=str(path),
        why=error.strerror or str(error),
        how="check the path and its permissions",
    )


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except SafetensorError as error:
        raise corrupt(path, str(error)) from error


def _read_torch(path: Path, *, mmap: bool) -> Any:
    try:
        _check_sums(path)
        with warnings.catch_warnings():
            # A refused file gets an error of its own; torch's advice to report it is beside it.
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    # torch's reader has no error class of its own: a damaged file comes out as UnpicklingError,
    # RuntimeError, EOFError, KeyError and others.
    except Exception as error:
        objects = _pickled_objects(path)
        if objects:
            raise CheckpointError(
                f"{path.name} holds pickled Python objects",
                where=str(path),
                why=f"unpickling can run any code, and this file imports {objects}",
                how="if you trust the file, load it yourself and save model.state_dict() with "
                "torch.save or safetensors.torch.save_file",
            ) from error
        text = str(error).strip().split("\n")[0].split(". ")[0]
        raise corrupt(path, f"{type(error).__name__}: {text}".rstrip(": ")) from error


def _check_sums(path: Path) -> None:
    """Check the checksums that the zip format of torch holds, and its reader does not look at."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                # A few of its bytes could become gigabytes.
                if entry.compress_type != zipfile.ZIP_STORED:
                    raise zipfile.BadZipFile(f"{entry.filename} is compressed")
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")


def _pickled_objects(path: Path) -> str:
    """What a refused file would import, found without unpickling; empty for a damaged file."""
    try:
        if zipfile.is_zipfile(path):
            return ", ".join(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
        with path.open("rb") as file:
            # torch's older format is a few pickles in a row; a bare pickle is one.
            while file.peek(1):
                for opcode, argument, _ in pickletools.genops(file):
                    if opcode.name == "GLOBAL" and not str(argument).startswith(_PLAIN_GLOBALS):
                        return str(argument).replace(" ", ".")
                    if opcode.name == "STACK_GLOBAL":
                        return "a Python object"
    except Exception:
        # Neither a whole archive nor a whole pickle: damaged, and nothing to name.
        return ""
    return ""


#: What torch's older format names even where it holds tensors only.
_PLAIN_GLOBALS = ("collections OrderedDict", "torch._utils _rebuild", "torch ")


def restore_tied(state: dict[str, torch.Tensor], own: Mapping[str, torch.Tensor]) -> None:
    """Fill in names of tied parameters, which writers of safetensors leave out."""
    stored = {id(own[name]): value for name, value in state.items() if name in own}
    for name, tensor in own.items():
        if name not in state and id(tensor) in stored:
            state[name] = stored[id(tensor)]


class Shaped(Protocol):
    """What has a shape: a tensor, or what a file says of one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of its dimensions."""


def check_fit(state: Mapping[str, Shaped], own: Mapping[str, Shaped], path: str | Path) -> None:
    """Check that a checkpoint has the names and shapes of a model."""
    missing = [name for name in own if name not in state]
    unknown = [name for name in state if name not in own]
    shapes = [
        f"{name} is {tuple(state[name].shape)}, the model's is {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    differences = [
        f"{label} {_some(names)}"
        for label, names in (
            ("the checkpoint lacks", missing),
            ("the model has no", unknown),
            ("shapes differ:", shapes),
        )
        if names
    ]
    if differences:
        raise CheckpointError(
            f"{Path(path).name} does not fit the model",
            where=str(path),
            why="; ".join(differences),
            how="build the model with the arguments that it was trained with",
        )


def _match_dtype(
    model: nn.Module,
    state: Mapping[str, torch.Tensor],
    own: Mapping[str, torch.Tensor],
    path: str | Path,
) -> None:
    """Give the model the checkpoint's dtype: loading would cast without a word."""
    differing = [name for name in own if state[name].dtype != own[name].dtype]
    kinds = {state[name].dtype for name in own if state[name].is_floating_point()}
    if not differing:
        return
    if len(kinds) != 1 or not all(own[name].is_floating_point() for name in differing):
        name = differing[0]
        raise CheckpointError(
            f"{Path(path).name} holds other dtypes than the model",
            where=f"{name} in {path}",
            why=f"it is {state[name].dtype}, the model's is {own[name].dtype}",
            how="convert the checkpoint to one floating-point dtype",
        )
    model.to(kinds.pop())


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _describe(value: object) -> str:
    return "nothing" if isinstance(value, Mapping) and not value else f"a {type(value).__name__}"


def corrupt(path: Path, why: str) -> CheckpointError:
    """Return the error for a checkpoint that cannot be read."""
    return CheckpointError(
        f"the checkpoint {path.name} is damaged",
        where=str(path),
        why=why,
        how="copy or download the file again; it is truncated, or not a checkpoint",
    )


def _not_a_state_dict(path: str | Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{Path(path).name} holds no state_dict",
        where=str(path),
        why=f"{why}, but a state_dict maps names to tensors",
        how=f"save model.state_dict(), by itself or under one of: {', '.join(NESTING_KEYS)}",
    )
