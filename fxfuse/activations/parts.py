"""Parts of a parameter that layers read: the queries' and the keys' rows of one projection, say."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

#: Operators that cut a tensor into parts, each a view of it.
_CUTS = {
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.slice.Tensor,
    aten.narrow.default,
    operator.getitem,
}
#: From a parameter to a part of it: nodes, each of which reads the one before.
ViewChain = tuple[fx.Node, ...]


def view_chain_of(node: Any) -> tuple[fx.Node, ViewChain] | None:
    """Find the node that reads a tensor of the state, and the views from it to `node`, if any."""
    way: list[fx.Node] = []
    while isinstance(node, fx.Node) and node.target in _CUTS:
        if node.all_input_nodes != [node.args[0]]:
            return None
        way.append(node)
        node = node.args[0]
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    return node, tuple(reversed(way))


def part_of(way: ViewChain, tensor: torch.Tensor) -> torch.Tensor:
    """Return the part of a tensor at the end of a way: a view of it."""
    value: Any = tensor
    for node in way:
        target: Any = node.target
        value = target(value, *node.args[1:], **node.kwargs)
    found: torch.Tensor = value
    return found


def is_read_once(way: ViewChain) -> bool:
    """Tell whether one node alone reads a part, and none the same cells by another way."""
    for node in way:
        taken = [user.args[1] for user in node.users if user.target is operator.getitem]
        several = len(taken) == len(node.users) == len(set(taken))
        if len(node.users) != 1 and not several:
            return False
    return True
