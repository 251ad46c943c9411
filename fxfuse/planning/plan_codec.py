"""The map of a group as JSON: lists of entries, or a matrix where every unit has a part in all.

A map that is not one-hot has an entry for each pair of units, which for a wide layer are millions:
its matrix stands there as the base64 of its rows, little-endian, in float32 where that is exact and
else in float64. The bytes are the same on every machine, so a digest covers them.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Index = NDArray[np.int64]
#: Entries of M or U, float64 [k], or one number for all.
Entries = float | NDArray[np.float64]

_EXACT, _SHORT = "<f8", "<f4"


class MapEntries(NamedTuple):
    """The entries of a map, as in `UnitMap`; each int64 [k] or as said there."""

    target: Index
    member: Index
    unit: Index
    weight: Entries
    read: Entries


def written(entries: MapEntries, n_units: int) -> dict[str, Any]:
    """The entries as JSON can hold them.

    Args:
        entries: The entries.
        n_units: Units of the fused group.
    """
    units = _dense(entries, n_units)
    if units is None:
        return {name: np.asarray(value).tolist() for name, value in entries._asdict().items()}
    both = {"weight": entries.weight, "read": entries.read}
    if np.array_equal(entries.weight, entries.read):
        del both["read"]
    return {"units": units, **{name: _packed(np.asarray(v)) for name, v in both.items()}}


def read(value: Mapping[str, Any], n_units: int) -> MapEntries:
    """The entries that `written` wrote.

    Args:
        value: What it returned, as JSON.
        n_units: Units of the fused group.

    Raises:
        ValueError: Lists have different lengths, or a matrix another size than its units.
        KeyError: Something is missing.
    """
    if "units" not in value:
        target, member, unit = (
            np.asarray(value[k], dtype=np.int64) for k in ("target", "member", "unit")
        )
        if not target.shape == member.shape == unit.shape:
            raise ValueError("lists of different lengths")
        # Plans written before maps had a U of their own have none: it was 1.
        weight, unmerge = (_listed(value.get(k, 1.0), target) for k in ("weight", "read"))
        return MapEntries(target, member, unit, weight, unmerge)
    counts = np.asarray(value["units"], dtype=np.int64)
    rows = int(counts.sum())
    weight = _unpacked(value["weight"], n_units * rows)
    unmerge = _unpacked(value["read"], n_units * rows) if "read" in value else weight
    return MapEntries(*_grid(counts, n_units), weight, unmerge)


def _dense(entries: MapEntries, n_units: int) -> list[int] | None:
    """Units of each member, where the entries are a whole matrix, row after row."""
    if np.ndim(entries.weight) == 0 or np.ndim(entries.read) == 0:
        return None
    counts = np.bincount(entries.member[: len(entries.member) // max(n_units, 1)])
    grid = _grid(counts, n_units)
    same = (np.array_equal(a, b) for a, b in zip(grid, entries[:3], strict=True))
    return counts.tolist() if all(same) else None


def _grid(counts: Index, n_units: int) -> tuple[Index, Index, Index]:
    """Target, member and unit of each entry of a whole matrix, row after row."""
    member = np.repeat(np.arange(len(counts)), counts)
    unit = np.arange(len(member)) - np.repeat(np.cumsum(counts) - counts, counts)
    target = np.repeat(np.arange(n_units), len(member))
    return target, np.tile(member, n_units), np.tile(unit, n_units)


def _packed(values: NDArray[np.float64]) -> dict[str, str]:
    short = values.astype(_SHORT)
    kind = _SHORT if np.array_equal(short, values) else _EXACT
    return {"type": kind, "base64": base64.b64encode(values.astype(kind).tobytes()).decode()}


def _unpacked(value: Mapping[str, str], count: int) -> NDArray[np.float64]:
    if value["type"] not in (_SHORT, _EXACT):
        raise ValueError(f"a matrix of {value['type']!r}, which is neither float32 nor float64")
    found = np.frombuffer(base64.b64decode(value["base64"], validate=True), value["type"])
    if len(found) != count:
        raise ValueError(f"a matrix of {len(found)} entries, and not of {count}")
    return found.astype(np.float64)


def _listed(value: Any, target: Index) -> Entries:
    if not isinstance(value, list):
        return float(value)
    weights = np.asarray(value, dtype=np.float64)
    if weights.shape != target.shape:
        raise ValueError("weights and entries of a map differ in number")
    return weights
