"""A `.safetensors` file of which tensors are read one at a time, its header once."""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open

from fxfuse.members.torch_file import corrupt, missing

#: Longest header that is read, bytes: a hundred thousand tensors have a third of it.
_HEADER = 1 << 25
#: The format's names of what is read here; whatever else there is, its own library reads.
_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: offset and length in bytes; dtype None is for the library to read."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None
    offset: int
    length: int


class TensorFile:
    """A file with its header read.

    The library reads the header again whenever it opens a file, which for a network of many small
    tensors takes ten times as long as reading the tensors.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with _open(path) as file:
            size = _header_length(file, path)
            # The library checks that every tensor lies in the file.
            with _opened(path):
                pass
            self._state = _state(file)
            header = json.loads(file.read(size))
        self.entries = {
            name: _entry(told, 8 + size) for name, told in header.items() if name != "__metadata__"
        }
        #: The shape of each tensor, by name.
        self.shapes = {name: entry.shape for name, entry in self.entries.items()}

    def read(self, name: str) -> torch.Tensor:
        """A tensor, as a view of a mapping of its part of the file, which ends with the tensor.

        What is written into it does not reach the file.
        """
        entry = self.entries[name]
        if entry.dtype is None or entry.offset % entry.dtype.itemsize:
            with _opened(self.path) as handle:
                tensor: torch.Tensor = handle.get_tensor(name)
            return tensor
        if not entry.length:
            return torch.empty(entry.shape, dtype=entry.dtype)
        before = entry.offset % mmap.ALLOCATIONGRANULARITY
        with _open(self.path) as file:
            if _state(file) != self._state:
                raise corrupt(self.path, "it changed while its tensors were being read")
            pages = mmap.mmap(
                file.fileno(),
                before + entry.length,
                access=mmap.ACCESS_COPY,
                offset=entry.offset - before,
            )
        count = entry.length // entry.dtype.itemsize
        flat = torch.frombuffer(pages, dtype=entry.dtype, count=count, offset=before)
        return flat.view(entry.shape)


def _entry(told: Mapping[str, Any], start: int) -> Entry:
    first, end = told["data_offsets"]
    dtype = _DTYPES.get(told["dtype"])
    return Entry(tuple(told["shape"]), dtype, start + first, end - first)


def check_header(path: Path) -> None:
    """Check that this is a file, and that its header is not too long to be read."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise missing(path, error) from error
    if not S_ISREG(mode) and not S_ISDIR(mode):
        raise corrupt(path, "it is no regular file")
    with _open(path) as file:
        _header_length(file, path)


def _header_length(file: IO[bytes], path: Path) -> int:
    size = int.from_bytes(file.read(8), "little")
    if size > _HEADER:
        raise corrupt(path, f"its header is longer than {_HEADER:,} bytes")
    return size


def _state(file: IO[bytes]) -> tuple[int, int, int]:
    found = os.fstat(file.fileno())
    return found.st_ino, found.st_size, found.st_mtime_ns


def _open(path: Path) -> IO[bytes]:
    try:
        return path.open("rb", buffering=0)
    except OSError as error:
        raise missing(path, error) from error


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except SafetensorError as error:
        raise corrupt(path, str(error)) from error
    except OSError as error:
        raise missing(path, error) from error
