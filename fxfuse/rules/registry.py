"""The registry of operator rules: one decorator, one lookup, no order of registration."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import fx

from fxfuse.errors import RuleError
from fxfuse.labels import Ledger, Value

#: A rule gets the ledger, the node and the node's arguments (nodes replaced by their values,
#: symbolic numbers by their hints) and returns the value of the node.
Rule = Callable[["Call"], Any]

_RULES: dict[Any, Rule] = {}


class Call:
    """One call of an operator, as a rule sees it.

    Attributes:
        ledger: Where the rule writes ties, freezes and mixings.
        node: The graph node.
        args: Positional arguments by schema, defaults filled in.
    """

    def __init__(
        self, ledger: Ledger, node: fx.Node, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        self.ledger = ledger
        self.node = node
        self.args = args
        self.kwargs = dict(kwargs)

    def argument(self, name: str) -> Any:
        """An argument by its name in the operator's schema, or the schema's default."""
        if name not in _names(self.node):
            raise RuleError(f"{self.node.target} has no argument {name!r}", where=self.node.name)
        return self.optional(name)

    def optional(self, name: str) -> Any:
        """As `argument`, or None where the operator's schema has no such argument."""
        return argument_of(self.node, name, self.args, self.kwargs)

    def values(self) -> list[Value]:
        """All tensor arguments, those in lists included."""
        found: list[Value] = []
        for argument in [*self.args, *self.kwargs.values()]:
            items = argument if isinstance(argument, list | tuple) else [argument]
            found.extend(x for x in items if isinstance(x, Value))
        return found

    @property
    def shape(self) -> tuple[int, ...]:
        """Concrete shape of the node's (single) result."""
        return concrete_shape(self.node.meta["val"])


def argument_of(node: fx.Node, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """An argument by its name in the schema, the default, or None where there is no such name."""
    if name not in _names(node):
        return None
    position = _names(node).index(name)
    if position < len(args):
        return args[position]
    schema: Any = node.target
    return kwargs.get(name, schema._schema.arguments[position].default_value)


def _names(node: fx.Node) -> list[str]:
    target: Any = node.target
    return [argument.name for argument in target._schema.arguments]


def concrete_shape(value: torch.Tensor) -> tuple[int, ...]:
    """Shape of a fake tensor with symbolic sizes replaced by their hints."""
    return tuple(hint(s) for s in value.shape)


def hint(size: Any) -> Any:
    """The number behind a symbolic number; anything else unchanged."""
    if isinstance(size, torch.SymInt | torch.SymFloat | torch.SymBool):
        return size.node.hint
    return size


def rule(*targets: Any) -> Callable[[Rule], Rule]:
    """Registers a function as the rule of one or more operators.

    Raises:
        RuleError: One of them has a rule already.
    """

    def register(function: Rule) -> Rule:
        for target in targets:
            if target in _RULES:
                raise RuleError(
                    f"{target} has two rules",
                    where=f"{function.__module__}.{function.__name__}",
                    how="keep one of them",
                )
            _RULES[target] = function
        return function

    return register


def find(target: Any) -> Rule | None:
    """The rule of an operator, or None: then its operands freeze."""
    return _RULES.get(target)


def registered() -> Mapping[Any, Rule]:
    """All rules by operator, read-only."""
    return MappingProxyType(_RULES)
