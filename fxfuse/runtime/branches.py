"""Isomorphic branches in a graph: the members of an ensemble, found by structure alone.

Two nodes are of one colour when they apply the same operator, with the same constants, to nodes of
one colour; what a branch reads of its own (a weight) is known by its shape alone, and everything
else by itself. So nodes of one colour are candidates for being the same step of different members.
Whether they are is then proven node by node: from two such nodes upwards, every pair has the same
operator, the same arguments in the same order and the same shapes, until both reach one and the
same node, or a weight each.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from operator import and_, or_
from typing import Any

import torch
from torch import fx

from fxfuse.graph.tensors import is_constant
from fxfuse.graph.torch_compat import pytree

#: Nodes of one branch by those of the first; the first one's are mapped to themselves.
Match = dict[fx.Node, fx.Node]

_LEAVES = ("placeholder", "get_attr")


@dataclass(frozen=True)
class Branches:
    """The members of an ensemble in one graph.

    Attributes:
        matches: For each member, its nodes by those of member 0: operators and weights.
        nodes: Operators of member 0, in graph order.
        weights: What member 0 reads of its own, in graph order.
        shared: What all members read, in graph order.
    """

    matches: tuple[Match, ...]
    nodes: tuple[fx.Node, ...]
    weights: tuple[fx.Node, ...]
    shared: tuple[fx.Node, ...]

    @cached_property
    def inside(self) -> frozenset[fx.Node]:
        """All nodes of all members."""
        return frozenset(node for match in self.matches for node in match.values())

    @cached_property
    def read_outside(self) -> tuple[fx.Node, ...]:
        """Operators of member 0 that something else reads, in some member."""
        return tuple(
            node
            for node in self.nodes
            if any(u not in self.inside for match in self.matches for u in match[node].users)
        )


def find_branches(graph: fx.Graph) -> Branches | None:
    """Return the largest set of isomorphic branches of a graph, or None."""
    order = {node: number for number, node in enumerate(graph.nodes)}
    reach = _ancestors(graph, order)
    best: list[Match] = []
    for nodes in sorted(_colours(graph), key=lambda c: -max(order[n] for n in c)):
        if best and len(best[0]) >= max(reach[n].bit_count() for n in nodes):
            continue
        found = _members(nodes, reach, order)
        if found and len(found[0]) > len(best[0] if best else ()):
            best = found
    if not best:
        return None
    _extend(best, order)
    own = sorted(best[0], key=order.__getitem__)
    read = {n for node in own for n in node.all_input_nodes if n not in best[0]}
    return Branches(
        tuple(best),
        tuple(n for n in own if n.op not in _LEAVES),
        tuple(n for n in own if n.op in _LEAVES),
        tuple(sorted(read, key=order.__getitem__)),
    )


def _ancestors(graph: fx.Graph, order: dict[fx.Node, int]) -> dict[fx.Node, int]:
    """For each node, itself and all that it is computed from: a bit for each node of the graph."""
    found: dict[fx.Node, int] = {}
    for node in graph.nodes:
        found[node] = reduce(or_, (found[n] for n in node.all_input_nodes), 1 << order[node])
    return found


def _colours(graph: fx.Graph) -> list[list[fx.Node]]:
    """Operators that may be the same step of different members: two or more of one colour."""
    colour: dict[fx.Node, int] = {}
    numbers: dict[Any, int] = {}
    classes: dict[int, list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        key: tuple[Any, ...] = ("leaf", _look(node)) if _is_weight(node) else ("one", node)
        if node.op == "call_function" and node.all_input_nodes:
            key = ("call", node.target, _frozen(node, colour), _look(node))
        colour[node] = numbers.setdefault(key, len(numbers))
        if node.op == "call_function":
            classes[colour[node]].append(node)
    return [nodes for nodes in classes.values() if len(nodes) > 1]


def _is_weight(node: fx.Node) -> bool:
    """Tell whether a node may be a weight: numbers that are given, of a size that does not change.

    Integers are constants, which members may not differ in, and their values are not known here.
    """
    value = node.meta.get("val")
    return (
        node.op in _LEAVES
        and isinstance(value, torch.Tensor)
        and not is_constant(value)
        and all(isinstance(size, int) for size in value.shape)
    )


def _look(node: fx.Node) -> Any:
    """Return what the results of nodes of one colour have in common."""
    leaves = pytree.tree_leaves(node.meta.get("val"))
    return tuple(
        (str(tuple(x.shape)), x.dtype, str(x.device), x.requires_grad)
        if isinstance(x, torch.Tensor)
        else str(x)
        for x in leaves
    )


def _frozen(node: fx.Node, colour: dict[fx.Node, int]) -> Any:
    """Return a node's arguments, its operands by their colours, as a key."""
    leaves, form = pytree.tree_flatten((node.args, dict(node.kwargs)))
    told = tuple(
        ("node", colour[x]) if isinstance(x, fx.Node) else (type(x).__name__, repr(x))
        for x in leaves
    )
    return str(form), told


def _members(
    nodes: Sequence[fx.Node], reach: dict[fx.Node, int], order: dict[fx.Node, int]
) -> list[Match]:
    """Disjoint branches that end in nodes of one colour; empty where these are no members."""
    common = reduce(and_, (reach[n] for n in nodes))
    shared = {node for node, number in order.items() if common >> number & 1}
    first = nodes[0]
    matches: list[Match] = []
    taken: set[fx.Node] = set()
    for node in nodes:
        match = _matched(first, node, shared)
        if match is None or taken & set(match.values()):
            return []
        taken |= set(match.values())
        matches.append(match)
    # A branch without a weight of its own is a step that somebody wrote down twice.
    return matches if any(n.op in _LEAVES for n in matches[0]) else []


def _matched(first: fx.Node, other: fx.Node, shared: set[fx.Node]) -> Match | None:
    """Pair all nodes of two branches, upwards from their ends; None where they differ."""
    match: Match = {}
    back: Match = {}
    waiting = [(first, other)]
    while waiting:
        a, b = waiting.pop()
        if a in shared or b in shared:
            if a is not b:
                return None
            continue
        if a in match or b in back:
            if match.get(a) is not b or back.get(b) is not a:
                return None
            continue
        if not _alike(a, b):
            return None
        match[a], back[b] = b, a
        if a.op not in _LEAVES:
            waiting += zip(_operands(a), _operands(b), strict=True)
    return match


def _alike(a: fx.Node, b: fx.Node) -> bool:
    """Tell whether two nodes are one step with other operands, or weights of one shape."""
    if a.op in _LEAVES or b.op in _LEAVES:
        return _is_weight(a) and _is_weight(b) and _look(a) == _look(b)
    if a.op != "call_function" or a.target != b.target or _look(a) != _look(b):
        return False
    same = dict.fromkeys((*a.all_input_nodes, *b.all_input_nodes), 0)
    return bool(_frozen(a, same) == _frozen(b, same))


def _operands(node: fx.Node) -> list[fx.Node]:
    """Return the nodes among the arguments, each as often as it is there."""
    leaves = pytree.tree_leaves((node.args, dict(node.kwargs)))
    return [x for x in leaves if isinstance(x, fx.Node)]


def _extend(matches: list[Match], order: dict[fx.Node, int]) -> None:
    """Take in what every member computes from its nodes alone: second outputs, last steps."""
    grown = True
    while grown:
        grown = False
        owner = {node: i for i, match in enumerate(matches) for node in match.values()}
        ends = sorted({u for n in matches[0] for u in n.users}, key=order.__getitem__)
        for node in ends:
            if node in owner or node.op != "call_function":
                continue
            row = _counterparts(node, matches, owner)
            if row:
                for match, other in zip(matches, row, strict=True):
                    match[node] = other
                grown = True
                break


def _counterparts(
    node: fx.Node, matches: Sequence[Match], owner: dict[fx.Node, int]
) -> list[fx.Node]:
    """The same step of every member, of a step of member 0; empty where some member lacks it."""
    operands = _operands(node)
    if not all(owner.get(n) == 0 or n not in owner for n in operands):
        return []
    row = [node]
    for match in matches[1:]:
        wanted = [match.get(n, n) for n in operands]
        users: Iterable[fx.Node] = (u for n in operands if n in match for u in match[n].users)
        found = (
            u
            for u in users
            if u not in owner and u not in row and _operands(u) == wanted and _alike(node, u)
        )
        other = next(found, None)
        if other is None:
            return []
        row.append(other)
    return row
