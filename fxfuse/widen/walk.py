"""The walk over the graph, and which handler widens which operator."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from fxfuse.apply import fused_side_by_side
from fxfuse.coupling import CouplingGraph
from fxfuse.labels import Value
from fxfuse.plan import FusionPlan
from fxfuse.rewrite import FusedModule, emit_graph
from fxfuse.rules import (
    Rule,
    contraction,
    find,
    movement,
    normalisation,
    pointwise,
    recurrent,
    reduction,
    selection,
)
from fxfuse.widen.carry import carry, keep, normalise
from fxfuse.widen.grouping import group, halve, patch
from fxfuse.widen.joining import join, overwrite, pad
from fxfuse.widen.movement import index, move
from fxfuse.widen.recurrence import recur
from fxfuse.widen.state import Layouts, WideGraph, has_tensor

#: Widens one node of the members' graph: rewrites its copy in the wide graph, and returns the
#: layouts of the result (a list of them where the node returns a list).
Handler = Callable[[WideGraph, fx.Node], Any]

#: By the rule of the operator; every other operator hands layouts on (`carry`).
_HANDLERS: Mapping[Rule | None, Handler] = {
    contraction.convolution: group,
    contraction.convolution_transposed: group,
    movement.cat: join,
    movement.move: move,
    movement.overwrite: overwrite,
    movement.pad: pad,
    movement.same: keep,
    movement.stack: join,
    movement.view: move,
    normalisation.group_norm: group,
    normalisation.layer_norm: normalise,
    pointwise.gated_linear_unit: halve,
    recurrent.cell: recur,
    recurrent.layers: recur,
    reduction.fold: patch,
    reduction.unfold: patch,
    selection.index: index,
    selection.index_select: index,
}


def widen(
    graph: CouplingGraph, plan: FusionPlan, states: Sequence[Mapping[str, torch.Tensor]]
) -> FusedModule:
    """Emits the concatenation of the members.

    Args:
        graph: The analysis of the members.
        plan: A plan of method `wide`.
        states: For each member, its tensors by name.

    Returns:
        A module whose labelled dimensions are N times as large as a member's.

    Raises:
        RewriteError: An operator's literals or layouts cannot be rewritten; names the node.
    """
    wide = _walk(graph, plan.n_members)
    state = fused_side_by_side(graph, plan, states, wide.places)
    return emit_graph(graph.captured, state, wide.graph, wide.orders)


def output_layouts(graph: CouplingGraph, n_members: int) -> list[Layouts]:
    """For each output tensor of the concatenation, the layouts of the dimensions that grow.

    Args:
        graph: The analysis of the members.
        n_members: N.

    Raises:
        RewriteError: As for `widen`.
    """
    wide = _walk(graph, n_members)
    outputs = [n for n in graph.captured.outputs() if isinstance(n, fx.Node)]
    return [wide.layout_of(n) for n in outputs if isinstance(graph.values[n], Value)]


def _walk(graph: CouplingGraph, n_members: int) -> WideGraph:
    wide = WideGraph(graph, n_members)
    for node in graph.captured.graph.nodes:
        if node.op == "call_function" and has_tensor(graph.values[node]):
            wide.layouts[node] = _widened(wide, node)
        elif node.op != "output":
            wide.layouts[node] = {}
    return wide


def _widened(wide: WideGraph, node: fx.Node) -> Any:
    first = node.args[0] if node.args else None
    if isinstance(first, fx.Node) and isinstance(wide.layouts.get(first), list):
        return wide.layouts[first][node.args[1]]
    return _HANDLERS.get(find(node.target), carry)(wide, node)
