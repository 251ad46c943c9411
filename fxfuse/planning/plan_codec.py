"""Plans as JSON: dataclasses field by field, and the map of a group as lists or as a matrix.

A map that is not one-hot has an entry for each pair of units, which for a wide layer are millions:
its matrix is there as the base64 of its rows, little-endian, in float32 where that is exact and
else in float64. The bytes are the same on every machine, so a digest covers them.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from enum import StrEnum
from math import isfinite
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import numpy as np
from numpy.typing import NDArray

Index = NDArray[np.int64]
#: Entries of M or U, float64 [k], or one number for all.
Entries = float | NDArray[np.float64]

_EXACT, _SHORT = "<f8", "<f4"
_PLAIN = {str: "a text", int: "an integer", float: "a finite number"}


# --- dataclasses ---------------------------------------------------------------------------------


def encode(value: Any) -> Any:
    """Return a value as JSON can hold it.

    Of a dataclass, fields at their default are left out, so that a field that is added later
    changes no digest. One that has a method `encoded` says itself what stands for it.
    """
    if hasattr(value, "encoded"):
        return value.encoded()
    if is_dataclass(value):
        each = ((f.name, getattr(value, f.name), _default(f)) for f in fields(value))
        return {name: encode(v) for name, v, default in each if v != default}
    if isinstance(value, Mapping):
        return {str(key): encode(entry) for key, entry in value.items()}
    if isinstance(value, frozenset):
        return sorted(value)
    if isinstance(value, tuple | list):
        return [encode(entry) for entry in value]
    return str(value) if isinstance(value, StrEnum) else value


def decode(kind: Any, value: Any, where: str) -> Any:
    """Read what `encode` made JSON of, checked against its type.

    Types are dataclasses, str, int, float, enumerations, and tuples, frozensets, mappings or unions
    with None of such. `where` is how the value's place is called in messages.
    """
    if hasattr(kind, "decoded"):
        return kind.decoded(_expect(dict, "an object", value, where), where)
    if is_dataclass(kind):
        return _decode_fields(kind, value, where)
    origin, args = get_origin(kind), get_args(kind)
    if origin is UnionType:
        (inner,) = (arg for arg in args if arg is not NoneType)
        return None if value is None else decode(inner, value, where)
    if origin is Literal or (isinstance(kind, type) and issubclass(kind, StrEnum)):
        choices = args or tuple(kind)
        if not isinstance(value, str) or value not in choices:
            raise ValueError(f"{where} is {_shown(value)}, and none of {', '.join(choices)}")
        return value if args else kind(value)
    if origin in (tuple, frozenset):
        entries = _expect(list, "a list", value, where)
        return origin(decode(args[0], e, f"{where}[{i}]") for i, e in enumerate(entries))
    if origin is Mapping:
        entries = _expect(dict, "an object", value, where).items()
        key, inner = args
        read_key = _integer_key if key is int else lambda name, _: name
        return {read_key(k, where): decode(inner, v, f"{where}[{k!r}]") for k, v in entries}
    return _decode_plain(kind, value, where)


def _decode_fields(kind: Any, value: Any, where: str) -> Any:
    entries, hints = _expect(dict, "an object", value, where), get_type_hints(kind)
    known = {f.name: f for f in fields(kind)}
    for name in entries:
        if name not in known:
            raise ValueError(f"{where} has the unknown entry {_shown(name)}")
    for name, f in known.items():
        if name not in entries and _default(f) is MISSING:
            raise ValueError(f"{where} lacks {name!r}")
    prefix = f"{where}." if where != "the plan" else ""
    return kind(**{name: decode(hints[name], v, prefix + name) for name, v in entries.items()})


def _decode_plain(kind: Any, value: Any, where: str) -> Any:
    if kind is float:
        # JSON writes 1.0 and 1 for the same number; true and false are none.
        if type(value) not in (int, float) or abs(value) > 1e308 or not isfinite(value):
            raise ValueError(f"{where} is {_shown(value)}, and not a finite number")
        return float(value)
    if type(value) is not kind:
        raise ValueError(f"{where} is {_shown(value)}, and not {_PLAIN[kind]}")
    return value


def _integer_key(name: str, where: str) -> int:
    if not name.isascii() or not name.isdecimal() or str(int(name)) != name:
        raise ValueError(f"{where} has the key {_shown(name)}, which is not a number from 0 on")
    return int(name)


def _expect(kind: type, called: str, value: Any, where: str) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"{where} is {_shown(value)}, and not {called}")
    return value


def _shown(value: Any) -> str:
    """Return a value in a message, at most 60 characters."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _default(f: Field[Any]) -> Any:
    return f.default if f.default_factory is MISSING else f.default_factory()


# --- maps ----------------------------------------------------------------------------------------


class MapEntries(NamedTuple):
    """The entries of a map, as in `UnitMap`; each int64 [k] or as said there."""

    target: Index
    member: Index
    unit: Index
    weight: Entries
    read: Entries


def encode_map(entries: MapEntries, n_units: int) -> dict[str, Any]:
    """Return the entries as JSON can hold them."""
    units = _dense(entries, n_units)
    if units is None:
        return {name: np.asarray(value).tolist() for name, value in entries._asdict().items()}
    both = {"weight": entries.weight, "read": entries.read}
    if np.array_equal(entries.weight, entries.read):
        del both["read"]
    return {"units": units, **{name: _packed(np.asarray(v)) for name, v in both.items()}}


def decode_map(value: Mapping[str, Any], n_units: int, where: str) -> MapEntries:
    """Return the entries that `encode_map` wrote; `where` names the map in messages."""
    lists = ("weight", "read", "units") if "units" in value else MapEntries._fields
    for name in sorted({*lists} - value.keys() - ({"read"} if "units" in value else set())):
        raise ValueError(f"{where} lacks {name!r}")
    for name in sorted(value.keys() - {*lists}):
        raise ValueError(f"{where} has the unknown entry {_shown(name)}")
    if "units" not in value:
        target, member, unit = (
            _indices(value[name], f"{where}.{name}") for name in MapEntries._fields[:3]
        )
        if not target.shape == member.shape == unit.shape:
            raise ValueError(f"{where} has lists of different lengths")
        weight, unmerge = (
            _numbers(value[name], target, f"{where}.{name}") for name in ("weight", "read")
        )
        return MapEntries(target, member, unit, weight, unmerge)
    counts = _indices(value["units"], f"{where}.units")
    # In Python's integers, which do not overflow. No more is made than what the matrices hold.
    size = n_units * sum(counts.tolist())
    weight = _unpacked(value["weight"], size, f"{where}.weight")
    unmerge = weight
    if "read" in value:
        unmerge = _unpacked(value["read"], size, f"{where}.read")
    return MapEntries(*_grid(counts, n_units if size else 0), weight, unmerge)


def _dense(entries: MapEntries, n_units: int) -> list[int] | None:
    """Return the units of each member, where the entries are a whole matrix, row after row."""
    if np.ndim(entries.weight) == 0 or np.ndim(entries.read) == 0:
        return None
    counts = np.bincount(entries.member[: len(entries.member) // max(n_units, 1)])
    grid = _grid(counts, n_units)
    same = (np.array_equal(a, b) for a, b in zip(grid, entries[:3], strict=True))
    return counts.tolist() if all(same) else None


def _grid(counts: Index, n_units: int) -> tuple[Index, Index, Index]:
    """Return the target, member and unit of each entry of a whole matrix, row after row."""
    member = np.repeat(np.arange(len(counts)), counts)
    unit = np.arange(len(member)) - np.repeat(np.cumsum(counts) - counts, counts)
    target = np.repeat(np.arange(n_units), len(member))
    return target, np.tile(member, n_units), np.tile(unit, n_units)


def _packed(values: NDArray[np.float64]) -> dict[str, str]:
    short = values.astype(_SHORT)
    kind = _SHORT if np.array_equal(short, values) else _EXACT
    return {"type": kind, "base64": base64.b64encode(values.astype(kind).tobytes()).decode()}


def _unpacked(value: Any, count: int, where: str) -> NDArray[np.float64]:
    entries = _expect(dict, "an object", value, where)
    kind, text = entries.get("type"), entries.get("base64")
    if kind not in (_SHORT, _EXACT) or not isinstance(text, str):
        raise ValueError(f"{where} is not a matrix of float32 or float64 in base64")
    try:
        found = np.frombuffer(base64.b64decode(text, validate=True), kind).astype(np.float64)
    except ValueError as error:
        raise ValueError(f"{where} cannot be read: {error}") from error
    if len(found) != count:
        raise ValueError(f"{where} is a matrix of {len(found)} entries, and not of {count}")
    if not np.isfinite(found).all():
        raise ValueError(f"{where} holds a value that is not finite")
    return found


def _indices(value: Any, where: str) -> Index:
    entries = _expect(list, "a list", value, where)
    for entry in entries:
        if type(entry) is not int or not 0 <= entry < 2**63:
            raise ValueError(f"{where} holds {_shown(entry)}, which is not an integer from 0 on")
    return np.asarray(entries, dtype=np.int64)


def _numbers(value: Any, target: Index, where: str) -> Entries:
    if not isinstance(value, list):
        number: float = _decode_plain(float, value, where)
        return number
    weights = np.asarray([_decode_plain(float, v, where) for v in value], dtype=np.float64)
    if weights.shape != target.shape:
        raise ValueError(f"{where} and the entries of the map differ in number")
    return weights
