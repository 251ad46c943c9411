"""How a value of each type is typed on the command line, and read back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from fxfuse.common.json_file import read_json
from fxfuse.common.options import alternatives
from fxfuse.errors import OptionError


@dataclass(frozen=True)
class Form:
    """How a value is typed.

    Attributes:
        kind: What typer reads; of a list, the flag may be repeated.
        metavar: What stands for the value in the help. None: typer's own word for the type.
        read: Makes the value from a flag's name and what typer read.
        note: What the help says of it besides.
    """

    kind: Any
    metavar: str | None
    read: Callable[[str, Any], Any]
    note: str = ""


def form_of(kind: Any) -> Form | None:
    """Return the form of a type; None for inputs (`Any`) and functions, which cannot be typed."""
    parts = [p for p in alternatives(kind) if p is not NoneType and get_origin(p) is not Callable]
    if not parts or Any in parts:
        return None
    words = [str(word) for part in parts if get_origin(part) is Literal for word in get_args(part)]
    others = tuple(part for part in parts if get_origin(part) is not Literal)
    if not others:
        return Form(str, "|".join(words), _unchanged)
    if others == (int,) and words:
        return Form(str, "|".join(["NUMBER", *words]), _number_or(words))
    try:
        return _FORMS[others]
    except KeyError:
        raise TypeError(f"no form of {kind} is known: add one to {__name__}") from None


def read_by_group(flag: str, texts: Iterable[str]) -> float | dict[str, float] | None:
    """Read a number for all coupling groups, or one for each pattern."""
    found: dict[str, float] = {}
    for text in texts:
        pattern, _, number = text.rpartition("=")
        try:
            if pattern in found or (found and "" in (pattern, *found)):
                raise ValueError(f"it contradicts another {flag}")
            found[pattern] = float(number)
        except ValueError as error:
            how = "write one number, such as 0.5, or PATTERN=NUMBER for each pattern"
            raise unreadable(flag, text, str(error), how) from error
    return found.get("", found or None)


def read_output_dims(flag: str, texts: Iterable[str]) -> dict[int, list[int]]:
    """Read dimensions by output, each text of the form OUTPUT=DIM,DIM."""
    found = {}
    for text in texts:
        output, equals, dims = text.partition("=")
        try:
            if not equals:
                raise ValueError("there is no '='")
            found[int(output)] = [int(dim) for dim in dims.split(",") if dim.strip()]
        except ValueError as error:
            how = "write OUTPUT=DIM,DIM with numbers, such as 0=1; 0= names no dimension"
            raise unreadable(flag, text, str(error), how) from error
    return found


def _read_numbers(flag: str, text: str) -> list[float]:
    """Read numbers with commas between them."""
    try:
        return [float(number) for number in text.split(",")]
    except ValueError as error:
        raise unreadable(flag, text, str(error), "write numbers, such as 0.5,0.3,0.2") from error


def _read_whole_numbers(flag: str, text: str) -> list[int]:
    """Read whole numbers with commas between them."""
    try:
        return [int(number) for number in text.split(",")]
    except ValueError as error:
        raise unreadable(flag, text, str(error), "write whole numbers, such as 224,224") from error


def unreadable(flag: str, text: str, why: str, how: str) -> OptionError:
    """Return the error for a text that is no value of a flag."""
    return OptionError(f"{flag} {text!r} cannot be read", why=why, how=how)


def _read_lists(flag: str, path: Path) -> list[Any]:
    """Read a list from a JSON file; its option class checks what it holds."""
    try:
        found = read_json(path)
        if not isinstance(found, list):
            raise ValueError(f"it holds a {type(found).__name__}")
    except ValueError as error:
        how = 'write one list of names for each member: [["cat", "dog"], ["dog", "fish"]]'
        raise unreadable(flag, str(path), str(error), how) from error
    return found


def _unchanged(flag: str, value: Any) -> Any:
    return value


def _number_or(words: Sequence[str]) -> Callable[[str, str], int | str]:
    def read(flag: str, text: str) -> int | str:
        if text in words:
            return text
        if text.lstrip("-").isdecimal():
            return int(text)
        how = f"write {flag} 0 or {flag} {words[0]}"
        raise unreadable(flag, text, f"it is neither a number nor {', '.join(words)}", how)

    return read


def _number(kind: type[int | float]) -> Callable[[str, Any], int | float]:
    def read(flag: str, value: Any) -> int | float:
        try:
            return kind(value)
        except ValueError as error:
            raise unreadable(flag, value, str(error), "write a number") from error

    return read


_REPEATED = "May be repeated."
#: Types of a field, None and words aside → their form.
_FORMS: dict[tuple[Any, ...], Form] = {
    (bool,): Form(bool, None, _unchanged),
    (int,): Form(int, None, _number(int)),
    (float,): Form(float, None, _number(float)),
    (str,): Form(str, None, _unchanged),
    (float, Mapping[str, float]): Form(
        list[str], "NUMBER|PATTERN=NUMBER", read_by_group, _REPEATED
    ),
    (tuple[float, ...],): Form(str, "NUMBER,NUMBER", _read_numbers),
    (tuple[int, int],): Form(str, "NUMBER,NUMBER", _read_whole_numbers),
    (tuple[str, ...],): Form(list[str], "PATTERN", lambda flag, texts: list(texts), _REPEATED),
    (Mapping[int, tuple[int, ...]],): Form(
        list[str],
        "OUTPUT=DIM,DIM",
        read_output_dims,
        f"Typed as `0=1,2`, or `0=` for no dimension. {_REPEATED}",
    ),
    (tuple[tuple[str, ...], ...],): Form(
        Path, "FILE", _read_lists, "A JSON file with one list for each member."
    ),
}
