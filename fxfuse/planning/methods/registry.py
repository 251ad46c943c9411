"""The registry of fusion methods (how to add one: docs/how-to/add-a-method.md)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from fxfuse.analysis.coupling import CouplingGraph
from fxfuse.errors import OptionError, RuleError
from fxfuse.planning.options import Options, State
from fxfuse.planning.plan import UnitMap

#: A method gets the analysis and the members' tensors, and returns one map per group.
Method = Callable[[CouplingGraph, Sequence[State], Options], tuple[UnitMap, ...]]

_METHODS: dict[str, Method] = {}


def method(name: str) -> Callable[[Method], Method]:
    """Registers a function as a fusion method."""

    def register(function: Method) -> Method:
        if name in _METHODS:
            raise RuleError(f"method {name!r} is registered twice", how="choose another name")
        _METHODS[name] = function
        return function

    return register


def find_method(name: str) -> Method:
    """A method by name."""
    if name not in _METHODS:
        raise OptionError(
            f"unknown method {name!r}", how=f"use one of {', '.join(sorted(_METHODS))}"
        )
    return _METHODS[name]


def check_variant(method: str, options: Options, known: Sequence[str]) -> None:
    """Checks that a method has the variant that was asked for."""
    if options.variant is not None and options.variant not in known:
        raise OptionError(
            f"unknown variant {options.variant!r} of {method}",
            how=f"use one of {', '.join(known)}, or None"
            if known
            else "leave variant out: this method has none",
        )


def methods() -> Mapping[str, Method]:
    """All methods by name, read-only."""
    return MappingProxyType(_METHODS)
