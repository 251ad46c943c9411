"""Reading and writing weights: `.safetensors`, or `.pt` files of torch.

Nothing here ever unpickles an object: see `fxfuse.members.torch_file`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn

from fxfuse.common.json_file import read_json
from fxfuse.common.output import MARK
from fxfuse.errors import CheckpointError
from fxfuse.graph.tensors import floating_dtype
from fxfuse.members.find_weights import (
    COUNTER,
    Shaped,
    Weights,
    differences,
    find_weights,
    log_choice,
    state_dicts,
)
from fxfuse.members.tensor_file import TensorFile, check_header
from fxfuse.members.torch_file import (
    check_no_objects,
    check_openable,
    corrupt,
    missing,
    read_torch,
)

#: Suffixes that torch.save is commonly used with.
TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".tar")
_SAFETENSORS, _INDEX = ".safetensors", ".index.json"
#: A file beside another one, by a name that any system could give it.
_FILE_NAME = re.compile(r"[^/\\\0\ud800-\udfff]{1,200}")
#: What is in a file beside the tensors; other programs look for the format.
_METADATA = {"format": "pt", "note": MARK}
#: Files with weights in a folder of transformers, timm or diffusers, in the order of preference.
_IN_FOLDERS = tuple(
    f"{name}{suffix}{index}"
    for name, suffix in (
        ("model", _SAFETENSORS),
        ("diffusion_pytorch_model", _SAFETENSORS),
        ("pytorch_model", ".bin"),
        ("diffusion_pytorch_model", ".bin"),
    )
    for index in ("", _INDEX)
)


def weights_in(folder: Path) -> Path | None:
    """Return the file in a folder that holds its weights, or leads to them; None: there is none."""
    return next((folder / name for name in _IN_FOLDERS if (folder / name).is_file()), None)


def read_file(path: str | Path, *, mmap: bool = False, stand_ins: bool = False) -> Any:
    """Read the tensors of a file onto the CPU, in whatever plain containers they are stored.

    `mmap` and `stand_ins` as in `fxfuse.members.torch_file.read_torch`.
    """
    path = Path(path)
    check_openable(path)
    if path.suffix == _SAFETENSORS:
        return _read_safetensors(path)
    if path.suffix in TORCH_SUFFIXES:
        return read_torch(path, mmap=mmap, stand_ins=stand_ins)
    raise CheckpointError(
        f"{path.name} has an unknown format",
        where=str(path),
        why=f"weights are read from .safetensors, {', '.join(TORCH_SUFFIXES)}",
        how="save the state_dict with safetensors.torch.save_file or torch.save",
    )


def read_state_dict(path: str | Path) -> dict[str, torch.Tensor]:
    """Read a state_dict onto the CPU, also one that is nested, under the names that it has."""
    found = _state_dicts(Path(path))
    return dict(min(found, key=lambda one: Weights(one[0], "", {}, (), ()).rank)[1])


def _state_dicts(
    path: Path, *, mmap: bool = False
) -> list[tuple[tuple[str, ...], Mapping[str, torch.Tensor]]]:
    """Return the state_dicts in a file, and the keys under which they are."""
    content = read_file(path, mmap=mmap, stand_ins=True)
    found = list(state_dicts(content))
    if not found:
        if path.suffix != _SAFETENSORS:
            check_no_objects(path)
        raise _not_a_state_dict(path, content)
    return found


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: its shape, and how it is read."""

    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]


class Stored:
    """The tensors of a checkpoint that are a network's, each read when it is asked for.

    Args:
        path: A `.safetensors` file, a `.pt` file, the index of several (`*.index.json`), or a
            folder that holds one of these, as `save_pretrained` writes it.
        own: The network's tensors by name.
        weights: The key or prefix of the weights to read, where there are several.
    """

    def __init__(
        self, path: str | Path, own: Mapping[str, Shaped], weights: str | None = None
    ) -> None:
        self.path = Path(path)
        stored = list(_stored(self.path))
        self._found, others = find_weights(stored, own, weights, self.path)
        # Who named the weights knows of the others.
        self._others = [] if weights else others
        tensors = dict(stored)[self._found.path]
        self._tensors = {name: tensors[held] for name, held in self._found.names.items()}

    def shapes(self) -> dict[str, torch.Tensor]:
        """Return for each tensor one without content, of its shape."""
        return {n: torch.empty(t.shape, device="meta") for n, t in self._tensors.items()}

    def dtype(self) -> torch.dtype:
        """That of the numbers in it, as `floating_dtype` says."""
        return floating_dtype(self.read(name) for name in self.shapes())

    def log(self) -> Stored:
        """Say where the tensors were found; return the checkpoint."""
        log_choice(self._found, self._others, self.path)
        return self

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor, on the CPU."""
        return self._tensors[name].read()


def _stored(path: Path) -> Iterator[tuple[tuple[str, ...], Mapping[str, StoredTensor]]]:
    """Yield the state_dicts in a checkpoint; a `.pt` file is mapped as a whole."""
    if path.is_dir():
        found = weights_in(path)
        if found is None:
            raise CheckpointError(
                f"cannot open the checkpoint {path.name}",
                where=str(path),
                why=f"it is a directory without {' or '.join(_IN_FOLDERS[::2])}",
                how="name the file that holds the weights; convert a checkpoint of "
                "torch.distributed.checkpoint with its function dcp_to_torch_save",
            )
        yield from _stored(found)
    elif path.name.endswith(_INDEX):
        yield (), _in_shards(path)
    elif path.suffix == _SAFETENSORS:
        file = TensorFile(path)
        yield (), {n: StoredTensor(s, partial(file.read, n)) for n, s in file.shapes.items()}
    else:
        # Its pages are the system's to keep or to drop.
        for keys, state in _state_dicts(path, mmap=True):
            yield keys, {n: StoredTensor(t.shape, partial(_itself, t)) for n, t in state.items()}


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _in_shards(index: Path) -> Mapping[str, StoredTensor]:
    """Return the tensors of a checkpoint in several files."""
    try:
        content = read_json(index)["weight_map"]
        files = {str(name): file for name, file in content.items()}
    except OSError as error:
        raise missing(index, error) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise corrupt(index, f"it holds no weight_map ({type(error).__name__}: {error})") from error
    for name, file in files.items():
        if not isinstance(file, str):
            raise corrupt(index, f"it places {name:.99} in a {type(file).__name__}")
        if not _FILE_NAME.fullmatch(file) or file in (".", ".."):
            raise corrupt(index, f"it places {name:.99} in {file!r:.99}, outside its folder")
    shards: dict[str, Mapping[str, StoredTensor]] = {}
    for file in dict.fromkeys(files.values()):
        shards[file] = dict(_stored(index.parent / file)).get((), {})
        lacking = next((n for n, f in files.items() if f == file and n not in shards[file]), None)
        if lacking is not None:
            raise corrupt(index, f"{file} lacks {lacking}")
    return {name: shards[file][name] for name, file in files.items()}


def load_checkpoint(model: nn.Module, path: str | Path, weights: str | None = None) -> None:
    """Load a checkpoint into a model, strictly, and keep the checkpoint's dtype.

    `weights` as in `Stored`.
    """
    stored = Stored(path, model.state_dict(keep_vars=True), weights).log()
    load_tensors(model, {name: stored.read(name) for name in stored.shapes()}, path)


def load_tensors(model: nn.Module, state: dict[str, torch.Tensor], path: str | Path) -> None:
    """Load the tensors of a checkpoint into a model, strictly, and keep their dtype."""
    own = model.state_dict(keep_vars=True)
    restore_tied(state, own)
    state |= {n: counter_like(t) for n, t in own.items() if n not in state and n.endswith(COUNTER)}
    check_fit(state, own, path)
    _match_dtype(model, state, own, path)
    model.load_state_dict(state, strict=True)


def write_state_dict(path: str | Path, state: Mapping[str, torch.Tensor]) -> None:
    """Write a state_dict as `.safetensors`, every name with its own copy of a tied tensor."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    seen: set[int] = set()
    for name, value in tensors.items():
        # safetensors rejects tensors that share memory; a strict load wants every name.
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


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        check_header(path)
        return safetensors.torch.load_file(path)
    except SafetensorError as error:
        raise corrupt(path, str(error)) from error


def restore_tied(state: dict[str, torch.Tensor], own: Mapping[str, torch.Tensor]) -> None:
    """Fill in names of tied parameters, which writers of safetensors leave out."""
    stored = {id(own[name]): value for name, value in state.items() if name in own}
    for name, tensor in own.items():
        if name not in state and id(tensor) in stored:
            state[name] = stored[id(tensor)]


def counter_like(counter: torch.Tensor) -> torch.Tensor:
    """Return what a counter that a checkpoint lacks begins with."""
    return torch.zeros_like(counter, device="cpu")


def check_fit(state: Mapping[str, Shaped], own: Mapping[str, Shaped], path: str | Path) -> None:
    """Check that a checkpoint has the names and shapes of a model."""
    found = differences(state, own)
    if found:
        raise CheckpointError(
            f"{Path(path).name} does not fit the model",
            where=str(path),
            why="; ".join(found),
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


def _describe(value: object) -> str:
    return "nothing" if isinstance(value, Mapping) and not value else f"a {type(value).__name__}"


def _not_a_state_dict(path: Path, content: Any) -> CheckpointError:
    why = f"it holds {_describe(content)}"
    if isinstance(content, Mapping):
        tensors = (isinstance(n, str) and isinstance(t, torch.Tensor) for n, t in content.items())
        odd = next((n for n, fits in zip(content, tensors, strict=True) if not fits), None)
        why = why if odd is None else f"{odd!r} is {_describe(content[odd])}"
    return CheckpointError(
        f"{path.name} holds no state_dict",
        where=str(path),
        why=f"{why}, but a state_dict maps names to tensors",
        how="save model.state_dict(), by itself or under a key such as state_dict or model",
    )
