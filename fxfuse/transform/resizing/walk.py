"""The walk over the graph, and which handler widens which operator."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from fxfuse.analysis.coupling import CouplingGraph
from fxfuse.analysis.labels import AbstractTensor
from fxfuse.analysis.rules import (
    Rule,
    contraction,
    creation,
    find,
    movement,
    normalisation,
    ordering,
    pointwise,
    recurrent,
    reduction,
    selection,
)
from fxfuse.errors import RewriteError
from fxfuse.members.ranks import of_each
from fxfuse.planning.plan import FusionPlan
from fxfuse.transform.apply import fused_tensors
from fxfuse.transform.emit import FusedModule, emit_graph
from fxfuse.transform.layout import Copies, copies_of
from fxfuse.transform.resizing.apart import Apart
from fxfuse.transform.resizing.each import run_apart, write_outputs
from fxfuse.transform.resizing.grouping import resize_gated, resize_groups, resize_patches
from fxfuse.transform.resizing.joining import join, overwrite, pad
from fxfuse.transform.resizing.movement import index, move, resize_gather, resize_written
from fxfuse.transform.resizing.propagate import (
    keep_layout,
    propagate_layouts,
    resize_chosen,
    resize_fill,
    resize_normalisation,
)
from fxfuse.transform.resizing.recurrence import resize_recurrence
from fxfuse.transform.resizing.state import Layouts, ResizedGraph, has_tensor

#: Widens one node of the members' graph: rewrites its copy in the wide graph, and returns the
#: layouts of the result (a list of them where the node returns a list).
Handler = Callable[[ResizedGraph, fx.Node], Any]

#: By the rule of the operator; every other operator hands layouts on (`propagate_layouts`).
_HANDLERS: Mapping[Rule | None, Handler] = {
    contraction.convolution: resize_groups,
    creation.filled: resize_fill,
    movement.cat: join,
    movement.move: move,
    movement.overwrite: overwrite,
    movement.pad: pad,
    movement.same: keep_layout,
    movement.stack: join,
    movement.view: move,
    normalisation.group_norm: resize_groups,
    normalisation.layer_norm: resize_normalisation,
    ordering.ranked: resize_chosen,
    pointwise.gated_linear_unit: resize_gated,
    recurrent.cell: resize_recurrence,
    recurrent.layers: resize_recurrence,
    reduction.choose: resize_chosen,
    reduction.fold: resize_patches,
    reduction.unfold: resize_patches,
    selection.gather: resize_gather,
    selection.index: index,
    selection.index_select: index,
    selection.scatter: resize_written,
    selection.write: resize_written,
    selection.write_rows: resize_written,
}


def emit_resized(
    graph: CouplingGraph, plan: FusionPlan, states: Sequence[Mapping[str, torch.Tensor]]
) -> FusedModule:
    """Emit the concatenation of the members, with the sizes that the plan gives."""
    wide = walk_of(graph, plan)
    names = wide.own_tensors()
    state = fused_tensors(graph, plan, states, wide.places, names)

    def kept(_: int, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {n: state[n].detach().clone().to(states[0][n].device) for n in names}

    each = [tensors for _, tensors in of_each(states, kept)]
    own = {n: [tensors[n] for tensors in each] for n in names}
    return emit_graph(graph.program, state, wide.graph, wide.orders, own)


def apart_names(graph: CouplingGraph, plan: FusionPlan) -> tuple[str, ...]:
    """Return the names of the tensors of which each member keeps its own in a wide model."""
    names = walk_of(graph, plan).own_tensors()
    return tuple(n for n in graph.program.names if graph.program.canonical[n] in names)


def output_layouts(graph: CouplingGraph, plan: FusionPlan) -> list[Layouts]:
    """For each output tensor of the resized network, the layouts of the dimensions that grow."""
    wide = walk_of(graph, plan)
    outputs = [n for n in graph.program.outputs() if isinstance(n, fx.Node)]
    return [wide.layout_of(n) for n in outputs if isinstance(graph.values[n], AbstractTensor)]


def limit_sizes(
    graph: CouplingGraph, sizes: Mapping[str, int]
) -> tuple[dict[str, int], dict[str, str]]:
    """Limit sizes to those that the network can be written in.

    A group whose size cannot change keeps a member's size. Also returns, for each of these
    groups, the operator and why.
    """
    limited, refused = dict(sizes), dict[str, str]()
    own = {group.name: group.n_units for group in graph.groups}
    while True:
        wide = ResizedGraph(graph, copies_of(graph, limited))
        stuck = _first_obstacle(wide)
        if stuck is None:
            return limited, refused
        node, error = stuck
        names = wide.units.groups_at(wide.values[n] for n in (node, *node.all_input_nodes))
        if not names:
            raise error
        for name in names:
            limited[name] = own[name]
            refused[name] = f"{error.why} ({error.where})"


def _first_obstacle(wide: ResizedGraph) -> tuple[fx.Node, RewriteError] | None:
    for node in wide.analysis.program.graph.nodes:
        try:
            _step(wide, node)
        except RewriteError as error:
            return node, error
    return None


def blank(
    graph: CouplingGraph,
    sizes: Mapping[str, int],
    empty: Callable[[Sequence[int], torch.dtype], torch.Tensor],
    plan: FusionPlan | None = None,
) -> FusedModule:
    """Return the resized network with tensors that hold nothing yet, for shapes and costs."""
    wide = walk_at(graph, copies_of(graph, sizes)) if plan is None else walk_of(graph, plan)
    program = graph.program

    def made(name: str) -> torch.Tensor:
        tensor = program.tensor(name)
        shape = list(tensor.shape)
        for dim in range(tensor.dim()):
            if (program.canonical[name], dim) in wide.resized:
                shape[dim] = wide.place_layout((program.canonical[name], dim)).size
        return empty(shape, tensor.dtype)

    names = wide.own_tensors()
    state = {name: made(name) for name in program.names if program.canonical[name] not in names}
    own: dict[str, list[torch.Tensor]] = {}
    for name in names:
        members = range(plan.n_members if plan else 0)
        each = (graph.of_member(member).program.tensor(name) for member in members)
        own[name] = [empty(tensor.shape, tensor.dtype) for tensor in each]
    return emit_graph(program, state, wide.graph, wide.orders, own)


def walk_of(graph: CouplingGraph, plan: FusionPlan) -> ResizedGraph:
    """Return the concatenated graph of a plan, written."""
    copies = copies_of(graph, plan.sizes())
    if plan.mixing.mode == "joint":
        return walk_at(graph, copies)
    apart = Apart(graph, plan, copies)
    while True:
        wide = ResizedGraph(graph, copies, apart)
        stuck = _first_obstacle(wide)
        if stuck is None:
            write_outputs(wide)
            # Values that were put together although nobody reads them so.
            wide.graph.eliminate_dead_code()
            return wide
        node, error = stuck
        # What cannot be written for all members at once is written for each, and what a member's
        # own values cannot be taken from as well.
        before = len(apart.nodes)
        apart.add(apart.dependent(node) if node in apart.nodes else [node])
        if len(apart.nodes) == before:
            raise error


def walk_at(graph: CouplingGraph, copies: Copies) -> ResizedGraph:
    """Return the network with so many copies of each unit, written for all of them at once."""
    wide = ResizedGraph(graph, copies)
    for node in graph.program.graph.nodes:
        _step(wide, node)
    return wide


def _step(wide: ResizedGraph, node: fx.Node) -> None:
    made_of_nodes = node.op == "call_function" and node.all_input_nodes
    if made_of_nodes and has_tensor(wide.values[node]):
        wide.layouts[node] = _widened(wide, node)
    elif node.op != "output":
        wide.layouts[node] = {}


def _widened(wide: ResizedGraph, node: fx.Node) -> Any:
    if wide.apart is not None and node in wide.apart.nodes:
        return run_apart(wide, node)
    first = node.args[0] if node.args else None
    if isinstance(first, fx.Node) and isinstance(wide.layouts.get(first), list):
        return wide.layouts[first][node.args[1]]
    return _HANDLERS.get(find(node.target), propagate_layouts)(wide, node)
