"""The walk over the members' one graph: every node gets the form that pays."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fxfuse.ensemble.forms import Form, Value, Writer, has_data_sizes, is_number, is_tensor
from fxfuse.ensemble.lowerings import find
from fxfuse.ensemble.policy import Policy
from fxfuse.ensemble.weights import Weights, is_variable
from fxfuse.graph.capture import Program
from fxfuse.graph.functional import is_write
from fxfuse.graph.operator_facts import follows_mode
from fxfuse.graph.torch_compat import pytree

aten = torch.ops.aten

_CHANNELS_LAST = (torch.channels_last, torch.channels_last_3d)
_SIZES = (aten.sym_size.int, aten.sym_numel.default)


def walk(members: Sequence[Program], policy: Policy, *, single: bool = False) -> Writer:
    """Write the members as one graph, without its output.

    Returns the graph, and what is in it for each node of the members' graph.
    """
    graph = fx.Graph()
    groups = policy.groups_convolutions(members[0].graph, single=single)
    writer = Writer(members, policy, graph, Weights(members, graph), groups)
    if changes_tensors(members[0].graph):
        _one_by_one(writer)
    else:
        for node in members[0].graph.nodes:
            if node.op != "output":
                writer.values[node] = _written(writer, node)
    return writer


def changes_tensors(graph: fx.Graph) -> bool:
    """Tell whether a graph writes into tensors, or has nodes that are there for their effect only.

    Drawing random numbers is no such effect.
    """
    return any(
        n.op == "call_function" and (is_write(n) or n.is_impure(impure_random=False))
        for n in graph.nodes
    )


def _written(writer: Writer, node: fx.Node) -> Value:
    first = writer.members[0]
    if node.op == "placeholder":
        return Value(Form.SHARED, shared=writer.graph.node_copy(node))
    if node.op == "get_attr":
        return _read(writer, first, node)
    forms = {writer.form(n) for n in node.all_input_nodes}
    if forms <= {Form.SHARED} and not (_is_random(node) or follows_mode(node)):
        return Value(Form.SHARED, shared=writer.graph.node_copy(node, writer.shared))
    if node.target in _SIZES and is_number(node):
        return _size(writer, node)
    if Form.STACKED in forms and node.target is operator.getitem:
        source: Any = node.args[0]
        item = writer.call(operator.getitem, writer.values[source].stacked, node.args[1])
        return Value(Form.STACKED, stacked=item)
    stacked = _stacked(writer, node, forms)
    return Value(Form.STACKED, stacked=stacked) if stacked else _split(writer, node)


def _read(writer: Writer, first: Program, node: fx.Node) -> Value:
    name = str(node.target)
    if name not in first.canonical:
        return Value(Form.SHARED, shared=writer.graph.node_copy(node))
    if not is_variable(first, name) or writer.weights.is_shared(name):
        return Value(Form.SHARED, shared=writer.weights.shared(name))
    if writer.weights.is_stackable(name):
        return Value(Form.WEIGHT, name)
    return Value(Form.SPLIT, split=tuple(writer.weights.own(name, i) for i in range(writer.n)))


def _size(writer: Writer, node: fx.Node) -> Value:
    source: Any = node.args[0]
    if node.target is aten.sym_size.int:
        return Value(Form.SHARED, shared=writer.size(source, int(node.args[1])))  # type: ignore[arg-type]
    return Value(Form.SHARED, shared=writer.call(node.target, writer.split(source)[0]))


def _stacked(writer: Writer, node: fx.Node, forms: set[Form]) -> fx.Node | None:
    """Return the node for all members at once, where that is possible and pays."""
    entry = find(node.target)
    if entry is None or has_data_sizes(node):
        return None
    if any(x in _CHANNELS_LAST for x in pytree.tree_leaves((node.args, dict(node.kwargs)))):
        return None
    if not is_tensor(node) and any(u.target is not operator.getitem for u in node.users):
        # Whoever takes the list as a whole would need every way between forms for lists too.
        return None
    operands = node.all_input_nodes
    if any(not is_tensor(n) and writer.form(n) is not Form.SHARED for n in operands):
        return None
    if any(n.op == "get_attr" and writer.form(n) is Form.SPLIT for n in operands):
        # Weights that cannot be kept as one tensor would be copied at every call.
        return None
    if Form.SPLIT in forms:
        if Form.STACKED not in forms and not entry.starts:
            return None
        copied = [n for n in operands if _is_copied(writer, n)]
        if not all(writer.policy.pays_copy(n, writer.n) for n in copied):
            return None
    return entry.run(writer, node)


def _is_copied(writer: Writer, node: fx.Node) -> bool:
    value = writer.values[node]
    return value.form is Form.SPLIT and value.stacked is None


def _split(writer: Writer, node: fx.Node) -> Value:
    operands = [writer.split(n) for n in node.all_input_nodes]
    own = []
    for member in range(writer.n):
        by_node = dict(zip(node.all_input_nodes, (o[member] for o in operands), strict=True))
        own.append(writer.graph.node_copy(node, by_node.__getitem__))
    return Value(Form.SPLIT, split=tuple(own))


def _one_by_one(writer: Writer) -> None:
    """Copy the whole graph for every member, each in its own order.

    What is written into belongs to one member: inputs and constants are copied first.
    """
    first = writer.members[0]
    written = written_tensors(first.graph)
    for node in first.graph.nodes:
        if node.op == "placeholder":
            writer.values[node] = Value(Form.SHARED, shared=writer.graph.node_copy(node))
    copies: list[dict[fx.Node, Any]] = []
    for member in range(writer.n):
        own: dict[fx.Node, Any] = {}
        for node in first.graph.nodes:
            if node.op == "output":
                continue
            if node.op == "get_attr" and node.target in first.canonical:
                own[node] = writer.weights.own(str(node.target), member)
                continue
            given = node.op == "placeholder"
            made = writer.shared(node) if given else writer.graph.node_copy(node, own.__getitem__)
            if node in written and node.op in ("placeholder", "get_attr") and is_tensor(node):
                made = writer.call(aten.clone.default, made)
            own[node] = made
        copies.append(own)
    for node in first.graph.nodes:
        if node.op != "output" and not is_number(node):
            writer.values[node] = Value(Form.SPLIT, split=tuple(own[node] for own in copies))
        elif node.op != "output":
            writer.values[node] = Value(Form.SHARED, shared=copies[0][node])


def written_tensors(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes whose tensors something may write into."""
    return _ancestors([n for n in graph.nodes if is_write(n)])


def _ancestors(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    open_nodes = list(nodes)
    while open_nodes:
        node = open_nodes.pop()
        if node not in found:
            found.add(node)
            open_nodes += node.all_input_nodes
    return found


def _is_random(node: fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
