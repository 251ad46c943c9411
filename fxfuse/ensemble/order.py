"""The order in which the stack runs: each member as far as it goes alone, then the next."""

from __future__ import annotations

from torch import fx

from fxfuse.graph.torch_compat import copy_signature


def in_depth(graph: fx.Graph) -> fx.Graph:
    """A copy of a graph without side effects, ordered so that what is needed next comes next.

    Where members run apart, one member's activations are done with before the next one's begin, so
    that they stay in the cache, and random numbers are drawn as the members alone would draw them.
    """
    place = {node: number for number, node in enumerate(graph.nodes)}
    copy = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            mapping[node] = copy.node_copy(node)
    (output,) = (node for node in graph.nodes if node.op == "output")
    waiting = [output]
    while waiting:
        node = waiting[-1]
        missing = [n for n in node.all_input_nodes if n not in mapping]
        if node in mapping or not missing:
            waiting.pop()
            if node not in mapping:
                mapping[node] = copy.node_copy(node, mapping.__getitem__)
            continue
        # The earliest one comes out on top.
        waiting += sorted(missing, key=place.__getitem__, reverse=True)
    copy_signature(graph, copy)
    return copy
