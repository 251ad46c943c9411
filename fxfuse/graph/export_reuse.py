"""Whether two modules are one program with other weights: then one capture does for both.

`torch.export` traces with tensors that have shapes and no values. So what it makes of a module
depends on its classes, on the plain values of its attributes and on the shapes of its tensors; two
modules that agree in all of these get the same graph. Whatever cannot be compared for sure makes
two modules strangers, and both are captured.
"""

from __future__ import annotations

import enum
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from fxfuse.graph.capture import Program
from fxfuse.graph.eager import alone
from fxfuse.graph.module_checks import check_alike, check_model, state_of
from fxfuse.graph.rebuild import rebuild
from fxfuse.graph.torch_compat import original_module

#: Immutable values, which are the same when they are equal.
_PLAIN = (
    bool | int | float | complex | str | bytes | range | slice | enum.Enum | torch.dtype
    | torch.device | torch.layout | torch.memory_format
)  # fmt: skip
#: What has no content of its own to compare: it is the same only as the same object.
_ATOMIC = type | types.FunctionType | types.BuiltinFunctionType | types.ModuleType | None
_SEQUENCES = (list, tuple, torch.Size)
_MAPPINGS = (dict, OrderedDict)


def captured_each(
    members: Sequence[object], program: Callable[[Any, Program | None], Program]
) -> list[Program]:
    """Check members and capture them; those that differ in weights only share one export."""
    members = [original_module(m) if isinstance(m, nn.Module) else m for m in members]
    for member in members:
        if not isinstance(member, Program):
            check_model(member)
    check_alike(members)
    found: list[Program] = []
    for member in members:
        first = found[0] if found else None
        # One that was given may have been captured with other inputs.
        known = first is not None and not isinstance(members[0], Program)
        twin = reuse_export(found[0], member) if known else None
        found.append(twin or program(member, first))
    return found


@alone
def reuse_export(first: Program, model: object) -> Program | None:
    """Return a model captured without `torch.export`, where the graph of another module is its own.

    None if `torch.export` has to be asked.
    """
    if not first.is_exported or not isinstance(model, nn.Module) or first.source is None:
        return None
    if not are_twins(first.source, model):
        return None
    # A float buffer that no state_dict() has stays the first one's, which holds the same numbers.
    return replace(first, module=rebuild(first.module, state_of(model)), source=model)


def are_twins(first: nn.Module, other: nn.Module) -> bool:
    """Tell whether two modules run the same operators, whatever their state_dict() holds.

    False also where that cannot be known: where a hook, a closure or an object of a foreign type is
    in an attribute, say.
    """
    return _Comparison(first, other).same(first, other)


class _Bare:
    """An object of a class that is written in Python, and has no slots."""


class _Comparison:
    """A walk along two object graphs, which have to be the same, references included."""

    def __init__(self, first: nn.Module, other: nn.Module) -> None:
        self._partner: dict[int, int] = {}
        self._taken: dict[int, int] = {}
        # Objects that only exist while they are compared would hand their ids on.
        self._alive: list[Any] = []
        states = first.state_dict(keep_vars=True), other.state_dict(keep_vars=True)
        # Of what is in a state_dict() only the shape counts.
        self._weights = {id(tensor) for state in states for tensor in state.values()}

    def same(self, a: Any, b: Any) -> bool:
        if type(a) is not type(b):
            return False
        if isinstance(a, _ATOMIC):
            return a is b
        if isinstance(a, _PLAIN):
            return bool(a == b)
        if id(a) in self._partner or id(b) in self._taken:
            return self._partner.get(id(a)) == id(b) and self._taken.get(id(b)) == id(a)
        self._partner[id(a)], self._taken[id(b)] = id(b), id(a)
        self._alive += [a, b]
        if isinstance(a, torch.Tensor):
            return self._same_tensors(a, b)
        if isinstance(a, set | frozenset):
            return all(isinstance(x, _PLAIN) for x in a) and bool(a == b)
        if type(a) in _SEQUENCES:
            return self._all_same(iter(a), iter(b))
        if type(a) in _MAPPINGS:
            return self._all_same(iter(a), iter(b)) and self._all_same(
                iter(a.values()), iter(b.values())
            )
        if isinstance(a, types.MethodType):
            return a.__func__ is b.__func__ and self.same(a.__self__, b.__self__)
        if type(a) is partial:
            parts = [(x.func, x.args, x.keywords) for x in (a, b)]
            return self.same(*parts)
        if type(a) is weakref.ref:
            return self.same(a(), b())
        # Modules, and other objects whose whole content is in their attributes: they have room for
        # nothing else, as those with slots have, or those that are written in C.
        known = type(a).__basicsize__ == _Bare.__basicsize__ and hasattr(a, "__dict__")
        return known and self.same(vars(a), vars(b))

    def _same_tensors(self, a: torch.Tensor, b: torch.Tensor) -> bool:
        if type(a) not in (torch.Tensor, nn.Parameter) or not self.same(vars(a), vars(b)):
            return False
        kinds = [
            (x.shape, x.dtype, x.device, x.layout, x.stride(), x.requires_grad) for x in (a, b)
        ]
        if kinds[0] != kinds[1]:
            return False
        if id(a) in self._weights or id(b) in self._weights:
            return id(a) in self._weights and id(b) in self._weights
        return not a.is_meta and torch.equal(a, b)

    def _all_same(self, ours: Iterator[Any], theirs: Iterator[Any]) -> bool:
        missing = object()
        for a in ours:
            b = next(theirs, missing)
            if b is missing or not self.same(a, b):
                return False
        return next(theirs, missing) is missing
