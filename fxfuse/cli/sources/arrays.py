"""Arrays of `.npy` and `.npz` files: the rows that are wanted, and memory for these alone."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from fxfuse.cli.sources.data import spread
from fxfuse.cli.sources.pairs import INPUTS, LABELS
from fxfuse.errors import InputError

#: Most bytes of an array and of its header, most arrays of a file, and bytes read at once.
_MOST, _HEADER, _ARRAYS, _CHUNK = 1 << 33, 10_000, 1000, 1 << 24


def read_arrays(path: Path, limit: int | None) -> NDArray[Any] | Mapping[str, NDArray[Any]]:
    """Read the array of a `.npy` file, or inputs and labels of a `.npz` file, by name.

    Objects, which would be unpickled, are rejected. Of at least `limit` rows as many are read,
    spread over the file.

    Raises:
        InputError: The arrays are too large for memory; or they differ in length.
        Exception: What numpy or zipfile raise of a damaged file.
    """
    if path.suffix == ".npy":
        with path.open("rb") as file:
            shape, fortran, dtype = _header(file)
            _check_size(path, shape, dtype, path.stat().st_size - file.tell(), limit)
        whole = np.load(path, mmap_mode="r", allow_pickle=False)
        return np.array(whole if fortran or not shape else whole[_rows(shape, limit)])
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.endswith(".npy")][:_ARRAYS]
        wanted = {name.removesuffix(".npy"): name for name in names}
        chosen = [next((n for n in known if n in wanted), None) for known in (INPUTS, LABELS)]
        if chosen[0] is not None:
            wanted = {name: wanted[name] for name in chosen if name is not None}
        lengths = {key: _length(path, archive, name, limit) for key, name in wanted.items()}
        if len(set(lengths.values())) > 1 and chosen[0] is not None:
            raise InputError(
                "inputs and labels differ in length",
                where=str(path),
                why=f"their lengths are {', '.join(map(str, lengths.values()))}",
                how="use as many labels as inputs, along the first dimension",
            )
        if chosen[0] is None and len(wanted) > 1:
            # None of them is read: what they are called says which are there.
            return {name: np.zeros(0) for name in wanted}
        return {key: _read(archive, name, limit) for key, name in wanted.items()}


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Return shape, order (whether Fortran's) and dtype of an array, as its header says."""
    version = npy.read_magic(file)
    if version == (1, 0):
        shape, fortran, dtype = npy.read_array_header_1_0(file)
    else:
        place = file.tell()
        if int.from_bytes(file.read(4), "little") > _HEADER:
            raise ValueError("its header is too long")
        file.seek(place)
        shape, fortran, dtype = npy.read_array_header_2_0(file)
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which would have to be unpickled")
    return shape, fortran, dtype


def _length(path: Path, archive: zipfile.ZipFile, name: str, limit: int | None) -> int:
    """Return the rows that an array says it has, after a check of its size."""
    with archive.open(name) as file:
        shape, _, dtype = _header(file)
        _check_size(path, shape, dtype, archive.getinfo(name).file_size - file.tell(), limit)
    return shape[0] if shape else 0


def _check_size(
    path: Path, shape: tuple[int, ...], dtype: np.dtype[Any], held: int, limit: int | None
) -> None:
    """Check that a file holds the bytes that its header announces, and that they are not many."""
    row, rows = dtype.itemsize, shape[0] if shape else 1
    for size in shape[1:]:
        row *= size
    if row * rows > held or min(shape, default=0) < 0:
        raise ValueError(f"its header announces {row * rows:,} bytes, and there are {held:,}")
    if row * min(rows, rows if limit is None else limit) > _MOST:
        raise InputError(
            f"{path.name} is too large",
            where=str(path),
            why=f"its arrays take {row * rows:,} bytes, and at most {_MOST:,} are read",
            how="use fewer examples, or set a limit in a recipe",
        )


def _rows(shape: tuple[int, ...], limit: int | None) -> NDArray[np.int64] | slice:
    if limit is None or shape[0] <= limit:
        return slice(None)
    return spread(shape[0], limit).numpy()


def _read(archive: zipfile.ZipFile, name: str, limit: int | None) -> NDArray[Any]:
    """Read rows of an array, a few at a time."""
    with archive.open(name) as file:
        shape, fortran, dtype = _header(file)
        rows = _rows(shape, limit) if shape and not fortran else slice(None)
        if isinstance(rows, slice):
            file.seek(0)
            whole: NDArray[Any] = npy.read_array(file, allow_pickle=False)
            return whole
        found = np.empty((len(rows), *shape[1:]), dtype)
        size = max(found[:1].nbytes, 1)
        step = max(_CHUNK // size, 1)
        for begin in range(0, shape[0], step):
            count = min(step, shape[0] - begin)
            content = file.read(count * size) if found.nbytes else b""
            inside = np.flatnonzero((rows >= begin) & (rows < begin + count))
            part = np.frombuffer(content, dtype).reshape(-1, *shape[1:]) if content else found[:0]
            found[inside] = part[rows[inside] - begin]
        # Its checksum is compared where a member of an archive ends.
        file.read(1)
    return found
