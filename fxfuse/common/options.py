"""Frozen option dataclasses: checked when they are made, and described once, by their docstring.

The command line's flags and the recipe's schema are derived from the fields of these classes, so
what one of the three offers the others offer, too.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from numbers import Integral, Real
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from fxfuse.errors import OptionError

#: How alike a name must be to be suggested: `l3` is half of `l2`.
_NEAR = 0.5
#: What a message calls a value of a type; other types are called by their name.
_WORDS = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "text",
    type(None): "None",
    Callable: "a function",
    Mapping: "a mapping",
    tuple: "a tuple",
}
_ENTRY = re.compile(r"^ {4}(\w+): (.*(?:\n {8,}.*)*)", re.MULTILINE)


class Options:
    """Base of the option dataclasses: a field takes values of its type only."""

    def __post_init__(self) -> None:
        """Check that each value is of its field's type, or one of those that it lists."""
        for option in fields_of(type(self)):
            value = getattr(self, option.name)
            if option.choices and value != option.default:
                check_choice(option.name, value, option.choices)
            elif not option.choices:
                _check_value(option, value, type(self).__name__)


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


def check_type(name: str, value: Any, kinds: type | tuple[type, ...], how: str) -> None:
    """Check the type of an argument.

    Args:
        name: The parameter.
        value: What the caller gave.
        kinds: What it may be an instance of.
        how: What to pass in its place.

    Raises:
        OptionError: It is none of them.
    """
    if not isinstance(value, kinds):
        raise OptionError(f"{name} cannot be {described(value)}", where=name, how=how)


def check_path(name: str, value: Any) -> None:
    """Check that an argument is the path of a file or a folder."""
    check_type(name, value, (str, os.PathLike), how="pass a path, such as 'results/fused'")


def described(value: Any) -> str:
    """Say what kind of thing a caller gave, as in 'a Tensor'."""
    if value is None or isinstance(value, str):
        return _WORDS[type(value)]
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


def _check_value(option: OptionField, value: Any, owner: str) -> None:
    kinds = alternatives(option.type)
    if any(_is_a(value, kind) for kind in kinds):
        return
    names = list(dict.fromkeys(word for kind in kinds for word in _named(kind)))
    listed = " or ".join([", ".join(names[:-1]), *names[-1:]] if len(names) > 1 else names)
    raise OptionError(
        f"{option.name} must be {listed}, got {value!r:.99}",
        where=f"{owner}({option.name}=...)",
        how=f"pass {names[0]}"
        + ("" if option.default is dataclasses.MISSING else ", or leave it out"),
    )


def _is_a(value: Any, kind: Any) -> bool:
    """Whether a value is of a type, as an annotation has it; whole numbers are numbers, too."""
    origin = get_origin(kind)
    if origin is Literal:
        return any(value == one and type(value) is type(one) for one in get_args(kind))
    kind = origin or kind
    if kind in (int, float):
        # A NaN is refused where a number has a range.
        return type(value) is not bool and isinstance(value, Integral if kind is int else Real)
    if kind is tuple:
        # Lists come from recipes.
        return isinstance(value, tuple | list)
    return kind is Any or not isinstance(kind, type) or isinstance(value, kind)


def _named(kind: Any) -> tuple[str, ...]:
    if get_origin(kind) is Literal:
        return tuple(map(repr, get_args(kind)))
    kind = get_origin(kind) or kind
    return (str(_WORDS.get(kind, getattr(kind, "__name__", kind))),)


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
