"""A network of another size beside the members' graph: which of its nodes stand for which."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxfuse.analysis.coupling import CouplingGraph, Place
from fxfuse.planning.plan import FusionPlan
from fxfuse.transform.emit import FusedModule, copy_graph, emit, emit_graph
from fxfuse.transform.layout import Layout, copies_of
from fxfuse.transform.resizing.walk import walk_of


@dataclass(frozen=True)
class Resized:
    """The graph of a fused network of another size than a member's.

    Attributes:
        graph: The graph in its eval form; tensors have the names that they have in the members.
        constants: Tensors that it reads beside the members', by name.
        nodes: For nodes of the members' graph, the node of `graph` that computes the same of the
            fused units; there is none for what is only written together with what follows.
        layouts: For nodes of the members' graph, the layouts of the dimensions of the result that
            have another size (a list where the node returns a list).
        places: The layouts of the dimensions of parameters and buffers that have another size.
    """

    graph: fx.Graph
    constants: Mapping[str, torch.Tensor]
    nodes: Mapping[fx.Node, fx.Node]
    layouts: Mapping[fx.Node, Any]
    places: Mapping[Place, Layout]


def resized_of(graph: CouplingGraph, plan: FusionPlan) -> Resized | None:
    """Return the resized network of a plan; None where every group has a member's size."""
    if not copies_of(graph, plan.sizes()):
        return None
    wide = walk_of(graph, plan)
    written = set(wide.graph.nodes)
    nodes = {
        node: own
        for node, own in wide.mapping.items()
        if own in written and node not in wide.pending
    }
    for node, own in nodes.items():
        # A value that was put together by several operators has the rank of the one it stands for.
        if "val" in node.meta:
            own.meta.setdefault("val", node.meta["val"])
    return Resized(wide.graph, wide.orders, nodes, wide.layouts, wide.places)


def emit_fused(
    graph: CouplingGraph, plan: FusionPlan, state: Mapping[str, torch.Tensor]
) -> FusedModule:
    """Emit the fused network of a plan, of whatever size, in eval mode with these tensors."""
    resized = resized_of(graph, plan)
    if resized is None:
        return emit(graph.program, state)
    return emit_graph(graph.program, state, copy_graph(resized.graph), resized.constants)
