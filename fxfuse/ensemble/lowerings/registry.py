"""The table of lowerings: how an operator runs for all members at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx

from fxfuse.ensemble.forms import Writer
from fxfuse.errors import RuleError

#: Writes one node of the members' graph for all members at once, or returns None where it cannot:
#: then it runs member by member. Nothing may be written before it is clear that it can.
Lowering = Callable[[Writer, fx.Node], "fx.Node | None"]


@dataclass(frozen=True)
class Entry:
    """A lowering.

    `starts`: it is worth while for operands that are not stacked yet. Others follow an operand that
    is.
    """

    run: Lowering
    starts: bool


_LOWERINGS: dict[Any, Entry] = {}


def lowering(*targets: Any, starts: bool = False) -> Callable[[Lowering], Lowering]:
    """Register a function as the lowering of operators, `torch.ops.aten.name.overload`.

    `starts`: it also takes operands that are not stacked yet.
    """

    def register(function: Lowering) -> Lowering:
        for target in targets:
            if target in _LOWERINGS:
                raise RuleError(f"{target} has two lowerings", how="keep one of them")
            _LOWERINGS[target] = Entry(function, starts)
        return function

    return register


def entry_of(target: Any) -> Entry | None:
    """Return the lowering that was registered for an operator."""
    return _LOWERINGS.get(target)


def registered() -> tuple[Any, ...]:
    """Return all operators with a lowering of their own."""
    return tuple(_LOWERINGS)
