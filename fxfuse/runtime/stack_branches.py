"""The lossless form of an ensemble found in a graph: isomorphic branches, run together."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassResult
from torch.fx.passes.tools_common import legalize_graph

from fxfuse.analysis.rules import contraction, find
from fxfuse.ensemble.forms import Form, Writer, is_number, is_tensor
from fxfuse.ensemble.policy import policy_of
from fxfuse.ensemble.walk import changes_tensors, walk
from fxfuse.graph.capture import Program
from fxfuse.graph.operator_facts import FACTS, Normalisation, in_training
from fxfuse.graph.tensors import attach
from fxfuse.runtime.branches import Branches, find_branches
from fxfuse.runtime.eval_form import WellFormed

aten = torch.ops.aten


class StackBranches(WellFormed):
    """Runs the members of an ensemble together, by the lowerings of `fxfuse.stack`.

    requires: nothing; a graph that is not understood whole is left alone.
    call: the largest set of isomorphic branches, if there is one, is written as one; the members'
        weights, inputs of the graph or tensors of the module, are put together where that pays.
        Nothing of that is seen from outside: whatever was read of a branch has the same value.
    ensures: the graph is well formed.

    Nodes carry the fake tensor of their result in `meta["val"]`, as those of `torch.export` do.

    Args:
        always: Also where that takes longer, as far as is known.
    """

    def __init__(self, *, always: bool = False) -> None:
        super().__init__()
        self.always = always

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Rewrite the graph in place."""
        graph = graph_module.graph
        if not _is_understood(graph):
            return PassResult(graph_module, False)
        # Before the search, which grows with the square of the graph.
        if not (self.always or _may_pay(graph)):
            return PassResult(graph_module, False)
        branches = find_branches(graph)
        if branches is None or not (self.always or _pays(branches)):
            return PassResult(graph_module, False)
        written = _together(branches)
        if written is None:
            return PassResult(graph_module, False)
        _splice(graph, branches, written)
        legalize_graph(graph_module)
        graph_module.graph.eliminate_dead_code()
        graph_module.recompile()
        return PassResult(graph_module, True)


def _is_understood(graph: fx.Graph) -> bool:
    """Tell whether a graph consists of operators whose results are all that they do."""
    for node in graph.nodes:
        if node.op == "call_module" or node.op == "call_method":
            return False
        if node.op == "call_function" and "val" not in node.meta:
            return False
        # In training it writes into the running statistics that it is given.
        if isinstance(FACTS.get(node.target), Normalisation) and in_training(node):
            return False
    return not changes_tensors(graph)


def _may_pay(graph: fx.Graph) -> bool:
    """Tell whether a graph has a linear layer for which running members together may pay."""
    return any(
        policy_of(node.meta["val"].device).pays_within([node])
        for node in graph.nodes
        if find(node.target) is contraction.linear
    )


def _pays(branches: Branches) -> bool:
    """Tell whether the members are faster as one, where their layers are linear ones."""
    layers = [node for node in branches.nodes if find(node.target) is contraction.linear]
    return bool(layers) and policy_of(_device(branches)).pays_within(layers)


def _device(branches: Branches) -> torch.device:
    read = (n.meta["val"].device for n in branches.shared if is_tensor(n))
    return next(read, torch.device("cpu"))


def _together(branches: Branches) -> Writer | None:
    """Return the members as one graph; None where nothing would run together."""
    if any(not (is_tensor(node) or is_number(node)) for node in branches.read_outside):
        return None
    members = [_member(branches, number) for number in range(len(branches.matches))]
    shapes = [n.meta["val"].shape for n in branches.shared if is_tensor(n)]
    single = any(shape and isinstance(shape[0], int) and shape[0] == 1 for shape in shapes)
    writer = walk(members, policy_of(_device(branches)), single=single)
    together = any(value.form is Form.STACKED for value in writer.values.values())
    return writer if together else None


def _member(branches: Branches, number: int) -> Program:
    """Return a branch as a captured network of its own; its tensors are the graph's fake ones."""
    match, graph = branches.matches[number], fx.Graph()
    module, names = fx.GraphModule({}, fx.Graph()), {}
    made: dict[fx.Node, fx.Node] = {}
    for node in branches.shared:
        made[node] = graph.placeholder(node.name)
        made[node].meta = dict(node.meta)
    for place, node in enumerate(branches.weights):
        names[node] = f"weight{place}"
        attach(module, names[node], match[node].meta["val"], persistent=True)
        made[node] = graph.create_node("get_attr", names[node])
        made[node].meta = dict(node.meta)
    for node in branches.nodes:
        made[node] = graph.node_copy(node, made.__getitem__)
    graph.output(tuple(made[node] for node in branches.nodes))
    module.graph = graph
    return Program(module, tuple(names.values()), {n: n for n in names.values()}, ((), {}))


def _splice(graph: fx.Graph, branches: Branches, writer: Writer) -> None:
    """Put the members' one graph into a graph, and let whoever read a member read it there."""
    first = dict(zip(_operators(writer.members[0]), branches.nodes, strict=True))
    outside = set(branches.read_outside)
    read = {node: writer.split(own) for own, node in first.items() if node in outside}
    made: dict[fx.Node, fx.Node] = {}
    given = (n for n in writer.graph.nodes if n.op == "placeholder")
    made.update(zip(given, branches.shared, strict=True))
    reads = {node: (key, who) for node, key, who in writer.weights.reads()}
    weights = {f"weight{place}": node for place, node in enumerate(branches.weights)}
    (end,) = (node for node in graph.nodes if node.op == "output")
    with graph.inserting_before(end):
        for node in writer.graph.nodes:
            if node in reads:
                key, who = reads[node]
                each = [match[weights[key]] for match in branches.matches]
                made[node] = each[who] if isinstance(who, int) else _stacked(graph, each, who)
            elif node not in made:
                made[node] = graph.node_copy(node, made.__getitem__)
    for node, values in read.items():
        for match, value in zip(branches.matches, values, strict=True):
            new = made[value]
            match[node].replace_all_uses_with(new, lambda user: user not in branches.inside)


def _operators(member: Program) -> list[fx.Node]:
    return [node for node in member.graph.nodes if node.op == "call_function"]


def _stacked(graph: fx.Graph, own: list[fx.Node], shape: tuple[int, ...]) -> fx.Node:
    """Return the members' weights as one tensor; gradients find their way back to each."""
    together: Any = graph.call_function(aten.stack.default, (own,))
    wanted = (len(own), *own[0].meta["val"].shape)
    if shape == wanted:
        return together  # type: ignore[no-any-return]
    return graph.call_function(aten.view.default, (together, list(shape)))
