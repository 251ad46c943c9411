"""The registry of fusion methods (how to add one: docs/how-to/add-a-method.md)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch

from fxfuse.coupling import CouplingGraph
from fxfuse.errors import RuleError, UnknownMethodError
from fxfuse.plan import UnitMap

State = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Options:
    """What a method may be told.

    Attributes:
        score: Name of the importance score.
        variant: Name of a variant of the method, or None.
    """

    score: str = "l2"
    variant: str | None = None


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
    """A method by name.

    Raises:
        UnknownMethodError: There is no such method.
    """
    if name not in _METHODS:
        raise UnknownMethodError(
            f"unknown method {name!r}", how=f"use one of {', '.join(sorted(_METHODS))}"
        )
    return _METHODS[name]


def methods() -> Mapping[str, Method]:
    """All methods by name, read-only."""
    return MappingProxyType(_METHODS)
