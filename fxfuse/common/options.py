"""Frozen option dataclasses: checked when they are made, and described once, by their docstring.

The command line's flags and the recipe's schema are derived from the fields of these classes, so
what one of the three offers the others offer, too.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from fxfuse.errors import OptionError

#: How alike a name must be to be suggested: `l3` is half of `l2`.
_NEAR = 0.5
_ENTRY = re.compile(r"^ {4}(\w+): (.*(?:\n {8,}.*)*)", re.MULTILINE)


class Options:
    """Base of the option dataclasses: a field of `Literal` type takes its listed values only."""

    def __post_init__(self) -> None:
        """Check that each value is one that its field lists."""
        for option in fields_of(type(self)):
            value = getattr(self, option.name)
            if option.choices and value != option.default:
                check_choice(option.name, value, option.choices)


@dataclass(frozen=True)
class OptionField:
    """One field of an option dataclass.

    Attributes:
        type: Its type, annotations resolved.
        default: Its default, `dataclasses.MISSING` where it has none.
        help: What its class's docstring says of it, on one line.
    """

    name: str
    type: Any
    default: Any
    help: str

    @property
    def choices(self) -> tuple[Any, ...]:
        """The values of the field's `Literal`, if its type has one and no other kind of value."""
        parts = [p for p in alternatives(self.type) if p is not type(None)]
        if not parts or any(get_origin(p) is not Literal for p in parts):
            return ()
        return tuple(value for part in parts for value in get_args(part))


def fields_of(kind: type) -> tuple[OptionField, ...]:
    """Describe the fields of an option dataclass, in their order.

    Its docstring has a Google-style `Attributes` section.
    """
    hints = get_type_hints(kind)
    texts = _descriptions(kind)
    return tuple(
        OptionField(field.name, hints[field.name], _default(field), texts.get(field.name, ""))
        for field in dataclasses.fields(kind)
        if field.init
    )


def check_choice(name: str, value: Any, known: tuple[Any, ...]) -> None:
    """Check that a value is a known one; the error names the nearest one."""
    if any(value == one and type(value) is type(one) for one in known):
        return
    near = get_close_matches(str(value), list(map(str, known)), n=1, cutoff=_NEAR)
    names = ", ".join(map(str, known))
    raise OptionError(
        f"unknown {name} {value!r}",
        why=f"did you mean {near[0]}?" if near else "",
        how=f"use one of {names}" if names else f"leave {name} out",
    )


def alternatives(kind: Any) -> tuple[Any, ...]:
    """Return the members of a union; of any other type, the type itself."""
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _descriptions(kind: type) -> Mapping[str, str]:
    """Return what the docstrings of a class and its bases say of each field."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        text = inspect.cleandoc(base.__doc__ or "")
        _, _, section = text.partition("Attributes:\n")
        for name, words in _ENTRY.findall(section):
            found[name] = " ".join(words.split())
    return found
