"""Where values of a run are kept: in memory as long as there is room, then in temporary files."""

from __future__ import annotations

import os
import shutil
import stat
import uuid
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import torch
from filelock import FileLock, Timeout

from fxfuse.graph.tensors import tensors_in
from fxfuse.graph.torch_compat import pytree

#: Bytes of activations that are kept in memory, of all networks that run side by side.
MEMORY = 2**29
#: How temporary folders are called.
_PREFIX = "fxfuse-spill-"


class SpillStore:
    """Room for values, one entry per batch.

    Args:
        memory: Bytes that may stay in memory. Each value that comes when there is no room for it
            is written to a file, and read again whenever it is asked for.
    """

    def __init__(self, memory: int = MEMORY) -> None:
        self.left = memory
        self._folder: Path | None = None
        self._numbers = count()

    def put(self, values: Iterable[Any]) -> Stored:
        """Take values one by one, so that never more than one is there beside what is kept."""
        return Stored(self, [self.keep(value) for value in values])

    def free(self, item: Any) -> None:
        """Take what `keep` returned off again."""
        if isinstance(item, _Written):
            item.path.unlink()
        else:
            self.left += _size(item)

    def keep(self, value: Any) -> Any:
        """Take one value, and return an item of `Stored`."""
        size = _size(value)
        if size <= self.left:
            self.left -= size
            return value
        if self._folder is None:
            self._folder, lock = _new_folder()
            weakref.finalize(self, _remove, self._folder, lock)
        path = self._folder / f"{next(self._numbers)}.pt"
        devices = [t.device for t in tensors_in(value)]
        # A copy, since of a view all memory behind it would be written.
        torch.save(pytree.tree_map_only(torch.Tensor, lambda t: t.detach().clone(), value), path)
        return _Written(path, devices[0])


@dataclass(frozen=True)
class Stored(Sequence[Any]):
    """Values on a shelf; those in files are read anew by each access."""

    store: SpillStore
    items: list[Any]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, batch: Any) -> Any:
        item = self.items[batch]
        return item.read() if isinstance(item, _Written) else item

    def __iter__(self) -> Iterator[Any]:
        return (self[batch] for batch in range(len(self)))

    def free(self, batch: int) -> None:
        """Take one value off, which nobody reads again."""
        self.store.free(self.items[batch])
        self.items[batch] = None

    def free_all(self) -> None:
        """Take off all values."""
        for batch in range(len(self)):
            self.free(batch)


@dataclass(frozen=True)
class _Written:
    """A value in a file."""

    path: Path
    device: torch.device

    def read(self) -> Any:
        return torch.load(self.path, map_location=self.device)


def _new_folder() -> tuple[Path, FileLock]:
    """Make a temporary folder, and remove those that killed processes left.

    Beside each folder lies a lock, which the system lets go of when its process ends. It is there
    before the folder is, so a folder whose lock is free belongs to no one any more.
    """
    place = Path(gettempdir())
    for entry in place.glob(f"{_PREFIX}*"):
        if _is_own(entry):
            lock = _lock_of(entry)
            with suppress(OSError, Timeout), lock:
                _remove(entry, lock)
    folder = place / f"{_PREFIX}{uuid.uuid4().hex}"
    lock = _lock_of(folder)
    lock.acquire()
    folder.mkdir(mode=0o700)
    return folder, lock


def _lock_of(folder: Path) -> FileLock:
    # Whichever thread drops the last value lets go of it.
    return FileLock(f"{folder}.lock", timeout=0, thread_local=False)


def _is_own(path: Path) -> bool:
    """Tell whether this is a folder of this user's, and no link."""
    with suppress(OSError):
        found = path.lstat()
        return stat.S_ISDIR(found.st_mode) and (
            not hasattr(os, "getuid") or found.st_uid == os.getuid()
        )
    return False


def _remove(folder: Path, lock: FileLock) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):
        os.unlink(lock.lock_file)
    lock.release()


def _size(value: Any) -> int:
    """Return the bytes of the memory that a value holds: of a view, all that it is a view of."""
    storages = [tensor.untyped_storage() for tensor in tensors_in(value)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
