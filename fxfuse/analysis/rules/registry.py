"""The registry of operator rules: one decorator, one lookup, no order of registration."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from itertools import chain
from types import MappingProxyType
from typing import Any

import torch
from torch import fx

from fxfuse.analysis.coupling_constraints import CouplingConstraints
from fxfuse.analysis.labels import AbstractTensor
from fxfuse.errors import RuleError
from fxfuse.graph.arguments import argument, argument_names
from fxfuse.graph.source_lines import where_of
from fxfuse.graph.torch_compat import hint, overloads_of, schema_of

#: A rule gets the ledger, the node and the node's arguments (nodes replaced by their values,
#: symbolic numbers by their hints) and returns the value of the node.
Rule = Callable[["Call"], Any]

_RULES: dict[Any, Rule] = {}


class Call:
    """One call of an operator, as a rule sees it.

    Attributes:
        coupling: Where the rule writes ties, freezes and mixings.
        node: The graph node.
        args: Positional arguments by schema, defaults filled in.
    """

    def __init__(
        self,
        coupling: CouplingConstraints,
        node: fx.Node,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> None:
        self.coupling = coupling
        self.node = node
        self.args = args
        self.kwargs = dict(kwargs)

    @property
    def where(self) -> str:
        """Name and source line of the node, for messages."""
        return where_of(self.node)

    def argument(self, name: str) -> Any:
        """Return an argument by its name in the operator's schema, or the schema's default."""
        names = argument_names(self.node.target)
        if name not in names:
            raise RuleError(
                f"{self.node.target} has no argument {name!r}",
                where=self.where,
                how=f"use one of {', '.join(names)}",
            )
        return self.optional(name)

    def optional(self, name: str) -> Any:
        """As `argument`, or None where the operator's schema has no such argument."""
        return argument(self.node, name, self.args, self.kwargs)

    def values(self) -> list[AbstractTensor]:
        """Return all tensor arguments, those in lists included."""
        found: list[AbstractTensor] = []
        for given in [*self.args, *self.kwargs.values()]:
            items = given if isinstance(given, list | tuple) else [given]
            found.extend(x for x in items if isinstance(x, AbstractTensor))
        return found

    def tensor_arguments(self) -> list[AbstractTensor | None]:
        """The arguments that the schema declares as one tensor, in its order; None if left out."""
        names = [
            declared.name
            for declared in schema_of(self.node.target).arguments
            if str(declared.type) in ("Tensor", "Optional[Tensor]")
        ]
        return [self.argument(name) for name in names]

    def is_read(self, result: int) -> bool:
        """Tell whether one of the operator's results is read by anybody."""
        return any(
            user.target is not operator.getitem or (user.args[1] == result and bool(user.users))
            for user in self.node.users
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """Concrete shape of the node's (single) result."""
        return concrete_shape(self.node.meta["val"])


def concrete_shape(value: torch.Tensor) -> tuple[int, ...]:
    """Return the shape of a fake tensor with symbolic sizes replaced by their hints."""
    return tuple(hint(s) for s in value.shape)


def rule(*targets: Any) -> Callable[[Rule], Rule]:
    """Register a function as the rule of one or more operators.

    Args:
        targets: Operators (`torch.ops.library.name.default`), packets of overloads
            (`torch.ops.library.name`: every overload), what `torch.library.custom_op` returned, or
            qualified names such as "torchvision::roi_align" for all overloads of an operator of a
            library that need not be installed.

    Returns:
        A decorator that leaves the function as it is.

    Raises:
        RuleError: One of them has a rule already.
    """

    def register(function: Rule) -> Rule:
        for target in chain.from_iterable(map(overloads_of, targets)):
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
    """Return the rule of an operator, itself or by its name, or None: then its operands freeze."""
    return _RULES.get(target) or _RULES.get(name_of(target))


def name_of(target: Any) -> str:
    """Return the qualified name of an operator without its overload; "" for other functions."""
    schema = schema_of(target)
    return "" if schema is None else str(schema.name)


def registered() -> Mapping[Any, Rule]:
    """Return all rules by operator, read-only."""
    return MappingProxyType(_RULES)
