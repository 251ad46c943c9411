"""Arguments of a graph, and structures of its inputs and outputs, as JSON and back."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from importlib import import_module
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import fx

from fxfuse.graph.example import register_dataclass
from fxfuse.graph.torch_compat import pytree

#: Most levels of nesting, values and characters of a text in a file.
_LEVELS, _VALUES, _TEXT = 20, 400_000, 10_000
_INTEGERS = range(-(1 << 63), 1 << 63)
#: The library whose output classes any graph may name, and the module that registers most of them.
_OUTPUTS, _OUTPUTS_MODULE = "transformers", "transformers.modeling_outputs"
_CONTAINERS = ("builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict")
_NAMED_TUPLE = "collections.namedtuple"
_LEAF = "*"


class NotPlainError(Exception):
    """A graph that cannot be written as plain data, or data that is no graph.

    Args:
        why: The reason.
        saving: What can be done about it when saving, where that is special.
        loading: The same when loading.
    """

    def __init__(self, why: str, *, saving: str = "", loading: str = "") -> None:
        super().__init__(why)
        self.why = why
        self.saving = saving
        self.loading = loading


class _Kind(NamedTuple):
    """A kind of value that JSON lacks, written as an object with one key."""

    of: type
    write: Callable[[Any], Any]
    read: Callable[[Any], Any]


def _named(of: type) -> _Kind:
    """Return the constants of torch, by their names."""
    known = {_short(value): value for value in vars(torch).values() if isinstance(value, of)}
    return _Kind(of, _short, known.__getitem__)


def _short(value: Any) -> str:
    return str(value).removeprefix("torch.")


_KINDS: Mapping[str, _Kind] = {
    "dtype": _named(torch.dtype),
    "layout": _named(torch.layout),
    "memory_format": _named(torch.memory_format),
    "device": _Kind(torch.device, str, torch.device),
    "float": _Kind(float, str, float),
    "complex": _Kind(complex, lambda z: [z.real, z.imag], lambda parts: complex(*parts)),
    "slice": _Kind(slice, lambda s: [s.start, s.stop, s.step], lambda ends: slice(*ends)),
    "tuple": _Kind(tuple, list, tuple),
    "dict": _Kind(dict, lambda d: [list(pair) for pair in d.items()], dict),
}


def to_data(value: Any) -> Any:
    """Write an argument: what JSON lacks is an object with its kind as the only key."""
    if isinstance(value, fx.Node):
        return {"node": value.name}
    finite = isinstance(value, float) and math.isfinite(value)
    if value is None or finite or isinstance(value, bool | int | str):
        return value
    if isinstance(value, list):
        return [to_data(item) for item in value]
    for name, kind in _KINDS.items():
        if isinstance(value, kind.of):
            return {name: to_data(kind.write(value))}
    raise NotPlainError(f"an argument is a {type(value).__name__}, which has no plain form")


def from_data(told: Any, nodes: Mapping[str, fx.Node]) -> Any:
    """Read what `to_data` wrote, within the limits; `nodes` may be referred to by name."""
    if isinstance(told, list):
        return [from_data(item, nodes) for item in told]
    if not isinstance(told, dict):
        return told
    ((name, content),) = told.items()
    return nodes[content] if name == "node" else _KINDS[name].read(from_data(content, nodes))


def to_structure(spec: pytree.TreeSpec) -> Any:
    """Write the structure of inputs or outputs: class, context (keys) and items; "*" is a leaf."""
    if spec.is_leaf():
        return _LEAF
    classes = pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE.items()
    name = next((name for name, found in classes if found is spec.type), None)
    if name is None:
        raise NotPlainError(
            f"an input or output is a {spec.type.__name__}, which has no name in files",
            saving="use tuples, lists and dicts, or register the class with a serialized_type_name "
            "(torch.export.register_dataclass)",
        )
    context = spec.context
    if name == _NAMED_TUPLE:
        context = f"{context.__module__}.{context.__qualname__}"
        if _imported(context) is not spec.context:
            raise NotPlainError(
                f"an input or output is a {context}, which cannot be imported",
                saving="define the named tuple in a module, outside of functions",
            )
    return [name, to_data(context), [to_structure(child) for child in spec.children()]]


def from_structure(told: Any, allow: Collection[str] | None) -> pytree.TreeSpec:
    """Read what `to_structure` wrote; `allow` names the libraries of classes, None: any."""
    if told == _LEAF:
        return pytree.treespec_leaf()
    name, context, items = told
    if name.startswith(_OUTPUTS_MODULE):
        # torch knows these classes once the module is imported; no other one ever is.
        with suppress(ImportError):
            import_module(_OUTPUTS_MODULE)
    own = context if name == _NAMED_TUPLE and isinstance(context, str) else name
    library = own.partition(".")[0]
    known = pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE
    named = allow is None or library in allow
    allowed = named or name in _CONTAINERS or library == _OUTPUTS
    kind = _imported(own) if named and (name == _NAMED_TUPLE or name not in known) else None
    if kind is not None and name not in known:
        register_dataclass(kind)
    is_named_tuple = kind is not None and pytree.is_namedtuple_class(kind)
    if name not in known or not allowed or (name == _NAMED_TUPLE and not is_named_tuple):
        how = "" if library == _OUTPUTS else f' and allowed: fxfuse.load(..., allow=("{library}",))'
        raise NotPlainError(
            f"it takes or returns a {own:.99}, which is not known or not allowed",
            loading=f"a class that the network returns must have been imported before{how:.99}",
        )
    children = [from_structure(item, allow) for item in items]
    found = kind if name == _NAMED_TUPLE else from_data(context, {})
    return pytree.TreeSpec(known[name], found, children)


def _imported(name: str) -> type | None:
    """Return a class that has been imported, by its full name; nothing is imported for it."""
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        found: Any = sys.modules.get(".".join(parts[:end]))
        for part in parts[end:]:
            # As a value: an attribute may be computed, and so run code.
            found = getattr(found, "__dict__", {}).get(part)
        if isinstance(found, type):
            return found
    return None


def check_limits(content: Any) -> None:
    """Check nesting and sizes of data before anything is made of it."""
    level, count = [content], 0
    for _ in range(_LEVELS):
        count += len(level)
        if count > _VALUES:
            raise NotPlainError(f"it holds more than {_VALUES:,} values")
        for value in level:
            if isinstance(value, int) and value not in _INTEGERS:
                raise NotPlainError("an integer does not fit into 64 bits")
            if isinstance(value, float) and not math.isfinite(value):
                raise NotPlainError("a number is too large")
            if isinstance(value, str) and len(value) > _TEXT:
                raise NotPlainError(f"a text has more than {_TEXT:,} characters")
        lists = [value for value in level if isinstance(value, list)]
        lists += [list(value.values()) for value in level if isinstance(value, dict)]
        level = list(chain.from_iterable(lists))
    if level:
        raise NotPlainError(f"it is nested more than {_LEVELS} levels deep")
