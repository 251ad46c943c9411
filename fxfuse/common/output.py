"""Writing results: whole or not at all, and never over something of the user's."""

from __future__ import annotations

import ctypes
import errno
import glob
import json
import os
import re
import shutil
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from fxfuse.common.json_file import read_json
from fxfuse.common.options import check_path
from fxfuse.errors import OutputError

#: Stands near the beginning or end of every file that may be replaced.
MARK = "Written by fxfuse"
_NEAR = 4096
#: Compiled forms have no room for it. They are ours where a file with it is beside them.
_COMPILED = (".pt2", ".onnx")
#: In a folder inside a result: the files that fxfuse wrote into it, with their sizes.
_MANIFEST = "fxfuse.json"
#: AT_FDCWD and RENAME_EXCHANGE of renameat2(2).
_HERE, _EXCHANGE = -100, 2
#: What comes after the name of an output in the name of a folder that is not finished.
_PARTIAL = re.compile(r"\.[0-9a-f]{8}\.(partial|old)")
#: The end of the name of an earlier result that steps aside.
_ASIDE = ".old"


def check_output(path: str | Path, names: Collection[str], *, force: bool = False) -> None:
    """Check that a folder may be written, before the work that fills it.

    `force` replaces an existing folder, which may hold nothing but files of these names that have
    the mark of fxfuse in them.
    """
    path = Path(path)
    if not os.path.lexists(path):
        return
    if path.is_symlink() or not path.is_dir():
        raise _exists(path, "it is not a folder", "choose another name")
    if not force:
        raise _exists(
            path, "a result is replaced on request only", "pass force=True, or choose another name"
        )
    foreign = _foreign(path, names)
    if foreign:
        raise _exists(
            path,
            f"replacing it would delete {foreign[0]}, which fxfuse did not write",
            "choose another folder",
        )


@contextmanager
def atomic_folder(
    path: str | Path, names: Collection[str], *, force: bool = False
) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` when the block ends without an error.

    After an error it is gone, and `path` is as it was. `force` as in `check_output`.
    """
    check_path("the path", path)
    path = Path(os.path.abspath(path))
    check_output(path, names, force=force)
    with locked(path), _partial(path) as work:
        yield work
        # Before the rename: after a power cut the name must not be there without the content.
        for file in (entry for entry in work.rglob("*") if entry.is_file()):
            _flush(file)
        _flush(work)
        check_output(path, names, force=force)
        _swap_in(work, path, names, force=force)
        _flush(path.parent)


@contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """Hold the right to write a name, until the block ends.

    The lock is a file beside the output, `.NAME.lock`, which is gone afterwards. The system lets go
    of it when its process ends, in whatever way, so that a file that a killed one left behind locks
    nothing. A thread that holds a name gets it again: a command locks its output before its work,
    and the writer that it calls locks it once more.
    """
    path = Path(os.path.abspath(path))
    made = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    place = path.parent / f".{path.name}.lock"
    lock = FileLock(place, timeout=0, is_singleton=True)
    try:
        if place.is_symlink():
            raise OutputError(
                f"{path.name} cannot be locked",
                where=str(place),
                why="the lock is a symbolic link, which may lead to a file of somebody's",
                how="remove the link",
            )
        try:
            lock.acquire()
        except Timeout:
            raise OutputError(
                f"another process is writing {path.name}",
                where=str(path),
                why=f"it holds the lock .{path.name}.lock",
                how="wait until it is done, or choose another name",
            ) from None
        try:
            yield
        finally:
            if lock.lock_counter == 1:
                # Before it is let go, so that nobody gets a file that is about to vanish; Windows
                # removes no open file.
                with suppress(OSError):
                    os.unlink(lock.lock_file)
            lock.release()
    finally:
        for folder in made:
            if folder.exists() and not any(folder.iterdir()):
                folder.rmdir()


@contextmanager
def _partial(path: Path) -> Iterator[Path]:
    """A folder beside another, gone after an error, as are those that killed writers left there."""
    # The lock is ours, so whatever is here belongs to no one any more.
    for entry in path.parent.glob(f".{glob.escape(path.name)}.*"):
        if not _PARTIAL.fullmatch(entry.name.removeprefix(f".{path.name}")):
            continue
        if entry.suffix == _ASIDE and not path.exists():
            # Its writer was killed between the two steps of an exchange.
            entry.rename(path)
        else:
            shutil.rmtree(entry, ignore_errors=True)
    # Beside the target, since a rename is atomic only within one file system.
    work = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.partial"
    try:
        work.mkdir()
        yield work
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary file that replaces `path` when the block ends without an error.

    After an error it is gone, and `path` is as it was.
    """
    check_path("the path", path)
    path = Path(path)
    # Beside the target, since a rename is atomic only within one file system; of the same suffix,
    # since writers may go by it.
    work = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}.partial{path.suffix}")
    try:
        yield work
        _flush(work)
        os.replace(work, path)
        _flush(path.parent)
    finally:
        work.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file whole or not at all; an existing file is replaced."""
    with atomic_file(path) as work:
        work.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: object) -> None:
    """Write JSON, indented, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _swap_in(work: Path, path: Path, names: Collection[str], *, force: bool) -> None:
    """Give a folder its name; what may have appeared under that name meanwhile is not lost."""
    if not force or not path.exists():
        try:
            # Replaces nothing but an empty folder.
            work.rename(path)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise _appeared(path) from error
            raise
        return
    if _exchange(work, path):
        if _foreign(work, names):
            _exchange(work, path)
            raise _appeared(path)
        shutil.rmtree(work)
        return
    # Elsewhere a folder with content cannot be replaced in one step: the old one steps aside first,
    # and comes back if the new one cannot take its place.
    aside = work.with_suffix(_ASIDE)
    path.rename(aside)
    try:
        if _foreign(aside, names):
            raise _appeared(path)
        work.rename(path)
    except BaseException:
        aside.rename(path)
        raise
    shutil.rmtree(aside)


def _foreign(folder: Path, names: Collection[str]) -> list[str]:
    """Return the names of what is in a folder and not written by fxfuse."""
    entries = list(folder.iterdir())
    ours = {entry.name for entry in entries if entry.name in names and _is_marked(entry)}
    if ours:
        files = (entry for entry in entries if entry.suffix in _COMPILED and _is_file(entry))
        ours |= {entry.name for entry in files if entry.name in names}
    return sorted({entry.name for entry in entries} - ours)


def write_manifest(folder: Path) -> None:
    """Note what a folder inside a result holds, so that it may be replaced as long as it does."""
    sizes = {entry.name: entry.stat().st_size for entry in sorted(folder.iterdir())}
    text = json.dumps({"note": f"{MARK}.", "files": sizes}, indent=2)
    (folder / _MANIFEST).write_text(text + "\n", encoding="utf-8")


def _is_manifested(folder: Path) -> bool:
    """Tell whether this is a folder, no link, that holds what fxfuse wrote and nothing else."""
    if folder.is_symlink() or not folder.is_dir() or not _is_marked(folder / _MANIFEST):
        return False
    try:
        known = read_json(folder / _MANIFEST)["files"]
        entries = {entry.name: entry for entry in folder.iterdir()}
        del entries[_MANIFEST]
        return all(_is_file(e) and known[name] == e.stat().st_size for name, e in entries.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _is_file(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _is_marked(path: Path) -> bool:
    """Tell whether this is a file, or a folder of files, of which fxfuse says that it wrote it."""
    if not _is_file(path):
        return _is_manifested(path)
    with path.open("rb") as file:
        found = file.read(_NEAR)
        file.seek(max(_NEAR, path.stat().st_size - _NEAR))
        return MARK.encode() in found + file.read()


def check_replaceable(path: Path) -> None:
    """Check that a file may be written: there is none, or one that fxfuse wrote."""
    if os.path.lexists(path) and not _is_marked(path):
        raise _exists(path, "fxfuse did not write it", "choose another name, or remove it")


def _appeared(path: Path) -> OutputError:
    return _exists(path, "it appeared while the result was written", "choose another name")


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two folders in one step, so that both names exist at every moment (Linux).

    Returns whether it did; not where the system or the file system cannot.
    """
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    paths = os.fsencode(one), os.fsencode(other)
    return int(rename(_HERE, paths[0], _HERE, paths[1], _EXCHANGE)) == 0


def _flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _exists(path: Path, why: str, how: str) -> OutputError:
    return OutputError(f"{path.name} exists already", where=str(path), why=why, how=how)
