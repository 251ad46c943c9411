"""Members of different architectures: each one's own graph is copied beside the others'."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from fxfuse.ensemble.forms import Form, Value, Writer, is_tensor
from fxfuse.ensemble.policy import Policy
from fxfuse.ensemble.walk import written_tensors
from fxfuse.ensemble.weights import Entry, Inventory, Place, Weights, as_words, name_in_stack
from fxfuse.graph.capture import Program
from fxfuse.graph.tensors import attach, fetch
from fxfuse.graph.torch_compat import free_unbacked_symbols

aten = torch.ops.aten


def side_by_side(members: Sequence[Program], policy: Policy) -> tuple[Writer, Program, Inventory]:
    """Write members of any graphs as one, without its output; they share the inputs alone.

    Args:
        members: Programs with the same inputs and outputs (`check_same_interface`).
        policy: What pays; nothing is lowered here.

    Returns:
        The graph, with a value for each of the first member's outputs; the stack without its
        graph; and where each tensor is.
    """
    graph = fx.Graph()
    writer = Writer(members, policy, graph, Weights(members, graph))
    inputs = [_input(graph, nodes) for nodes in zip(*map(_placeholders, members), strict=True)]
    outputs = [
        _inlined(writer, number, member, inputs, as_words(member.names))
        for number, member in enumerate(members)
    ]
    nodes = (node for node in members[0].outputs() if isinstance(node, fx.Node))
    for node, values in zip(nodes, zip(*outputs, strict=True), strict=True):
        writer.values[node] = Value(Form.SPLIT, split=tuple(values))
        if not is_tensor(node) and not free_unbacked_symbols(node.meta.get("val")):
            # A size, which is that of the same inputs.
            writer.values[node] = Value(Form.SHARED, shared=values[0])
    return writer, *_joined(members)


def _placeholders(member: Program) -> list[fx.Node]:
    return [node for node in member.graph.nodes if node.op == "placeholder"]


def _input(graph: fx.Graph, nodes: Sequence[fx.Node]) -> fx.Node:
    """One input for all members; where one of them has a fixed batch, so has the stack."""

    def open_sizes(node: fx.Node) -> int:
        shape = getattr(node.meta.get("val"), "shape", ())
        return sum(not isinstance(size, int) for size in shape)

    copy = graph.node_copy(nodes[0])
    copy.meta = dict(min(nodes, key=open_sizes).meta)
    return copy


def _inlined(
    writer: Writer,
    number: int,
    member: Program,
    inputs: Sequence[fx.Node],
    words: dict[str, str],
) -> list[Any]:
    """Copy a member's graph; returns its outputs in it.

    What is written into belongs to one member: inputs and constants are copied first.
    """
    written, given = written_tensors(member.graph), iter(inputs)
    own: dict[fx.Node, Any] = {}
    for node in member.graph.nodes:
        if node.op == "output":
            continue
        if node.op == "get_attr" and node.target in member.canonical:
            name = member.canonical[str(node.target)]
            made = writer.graph.create_node(
                "get_attr", name_in_stack(Place.MEMBERS, words[name], number)
            )
            made.meta = dict(node.meta)
            own[node] = made
            continue
        if node.op == "placeholder":
            made = next(given)
        else:
            made = writer.graph.node_copy(node, own.__getitem__)
        if node.op == "get_attr":
            # Two members may have constants of one name.
            made.target = f"{number}.{node.target}"
            writer.constants[made.target] = member.tensor(str(node.target))
        if node in written and node.op in ("placeholder", "get_attr") and is_tensor(node):
            made = writer.call(aten.clone.default, made)
        own[node] = made
    return [own[node] for node in member.outputs() if isinstance(node, fx.Node)]


def _joined(members: Sequence[Program]) -> tuple[Program, Inventory]:
    """Copies of all members' tensors by their names in the stack, and where each one is."""
    holder = fx.GraphModule({}, fx.Graph())
    canonical: dict[str, str] = {}
    made: dict[int, str] = {}
    entries: list[tuple[Entry, ...]] = []
    for number, member in enumerate(members):
        words, own = as_words(member.names), []
        for name in member.names:
            tensor, key = member.tensor(name), member.canonical[name]
            written = name_in_stack(Place.MEMBERS, words[name], number)
            own.append(Entry(name, Place.MEMBERS, tuple(tensor.shape), key, words[name]))
            canonical[written] = made.setdefault(id(tensor), written)
            if canonical[written] != written:
                attach(holder, written, fetch(holder, canonical[written]), persistent=True)
                continue
            # A copy, since training the stack must not change the members.
            kept = tensor.detach().clone()
            if isinstance(tensor, nn.Parameter):
                kept = nn.Parameter(kept, requires_grad=tensor.requires_grad)
            attach(holder, written, kept, persistent=True)
        entries.append(tuple(own))
    joined = replace(
        members[0], module=holder, names=tuple(canonical), canonical=canonical, source=None
    )
    return joined, Inventory(tuple(entries))
