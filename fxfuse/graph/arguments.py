"""Arguments of a call of an operator, by their names in the operator's schema."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx

from fxfuse.graph.torch_compat import schema_of


def argument_names(operator: Any) -> list[str]:
    """Names of an operator's arguments, in the order of its schema; of other functions none."""
    schema = schema_of(operator)
    return [] if schema is None else [argument.name for argument in schema.arguments]


def argument(
    node: fx.Node,
    name: str,
    args: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> Any:
    """Return an argument of a node by its name in the operator's schema, or its default.

    None where the schema has no such name. `args` and `kwargs` stand for the node's own (values of
    an analysis, say).
    """
    names = argument_names(node.target)
    if name not in names:
        return None
    position = names.index(name)
    args, kwargs = node.args if args is None else args, node.kwargs if kwargs is None else kwargs
    if position < len(args):
        return args[position]
    return kwargs.get(name, schema_of(node.target).arguments[position].default_value)


def set_argument(node: fx.Node, name: str, value: Any) -> None:
    """Change an argument of a node, by its name in the operator's schema."""
    names = argument_names(node.target)
    position = names.index(name)
    if schema_of(node.target).arguments[position].kwarg_only:
        node.update_kwarg(name, value)
        return
    # What stands before it, and was left out or given by name, is written out as well.
    written = [argument(node, n) for n in names[: max(position + 1, len(node.args))]]
    written[position] = value
    node.args = tuple(written)
    node.kwargs = {n: x for n, x in node.kwargs.items() if n not in names[: len(written)]}
