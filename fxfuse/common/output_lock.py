"""One writer at a time: a lock on the name of an output, which ends with its process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fxfuse.errors import OutputError

try:
    import fcntl

    _has_locks = True
except ImportError:
    # Elsewhere than on POSIX a second writer is found out by `OutputError` only.
    _has_locks = False

#: Names that this process holds: a command locks its output before its work, and the writer that it
#: calls locks it again.
_held: set[Path] = set()


@contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """Holds the right to write a name, until the block ends.

    The lock is a file beside the output, `.NAME.lock`, which is gone afterwards. The system lets go
    of it when its process ends, in whatever way, so that a file that a killed one left behind locks
    nothing.
    """
    path = Path(os.path.abspath(path))
    if not _has_locks or path in _held:
        yield
        return
    made = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.parent / f".{path.name}.lock"
    try:
        handle = _acquire(file, path)
        _held.add(path)
        try:
            yield
        finally:
            _held.discard(path)
            # Before it is let go, so that nobody gets the lock on a file that is about to vanish.
            file.unlink(missing_ok=True)
            os.close(handle)
    finally:
        for folder in made:
            if folder.exists() and not any(folder.iterdir()):
                folder.rmdir()


def _acquire(file: Path, path: Path) -> int:
    """Opens and locks the file."""
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its last holder may have removed it between the two lines above.
            if file.exists() and os.path.samestat(os.fstat(handle), os.stat(file)):
                return handle
        except BlockingIOError:
            os.close(handle)
            raise OutputError(
                f"another process is writing {path.name}",
                where=str(path),
                why=f"it holds the lock {file.name}",
                how="wait until it is done, or choose another name",
            ) from None
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
