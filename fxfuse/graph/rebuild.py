"""Rebuilding: the nodes of an exported graph are copied into a plain `torch.fx.GraphModule`.

The module that `torch.export` hands out can neither be put into `train()` nor pickled
(docs/adr/0001-training-ir.md).
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from operator import attrgetter
from typing import Any, cast

import torch
from torch import fx, nn

from fxfuse.errors import CaptureError
from fxfuse.graph.functional import functional
from fxfuse.graph.operator_facts import follows_mode, set_training
from fxfuse.graph.source_lines import where_of
from fxfuse.graph.tensors import attach, fetch
from fxfuse.graph.torch_compat import copy_signature

#: Operators that only state facts which hold for the captured device and dtype: they would break
#: the fused module after `.to("cuda")` or `.to(torch.bfloat16)`.
_ASSERTIONS = (torch.ops.aten._assert_tensor_metadata.default,)

#: Memory that holds anything until it is written becomes zeros: no network depends on what was
#: there, but NaN in it would look like an activation, and what a run keeps would differ each time.
_WRITTEN: dict[Any, Any] = {
    torch.ops.aten.empty.memory_format: torch.ops.aten.zeros.default,
    torch.ops.aten.empty_like.default: torch.ops.aten.zeros_like.default,
    torch.ops.aten.new_empty.default: torch.ops.aten.new_zeros.default,
}

#: Regions that only change how their operators run (gradients, autocast, recomputation), with the
#: position of their subgraph. An autocast region runs in the dtype of its operands once inlined.
_REGIONS: dict[Any, int] = {
    torch.ops.higher_order.wrap_with_set_grad_enabled: 1,
    torch.ops.higher_order.wrap_with_autocast: 4,
    torch.ops.higher_order.tag_activation_checkpoint: 0,
}


def rebuild(
    source: fx.GraphModule, state: Mapping[str, torch.Tensor], *, prune: bool = True
) -> fx.GraphModule:
    """Copy an exported graph into a fresh graph module that holds `state`.

    Args:
        source: What `ExportedProgram.module()` returns.
        state: Tensors by `state_dict()` name, kept even where the graph does not use them.
        prune: Whether nodes without users are left out, and writes into activations become values.

    Returns:
        A graph module in eval mode: `no_grad` regions inlined, assertions dropped, every
        `training` argument False.
    """
    # Attached before the graph is set: GraphModule itself would copy only what the graph reads,
    # in the order of the graph, and lose the names and the order of the state_dict.
    module = fx.GraphModule({}, fx.Graph())
    for name, tensor in state.items():
        attach(module, name, tensor, persistent=True)
    graph = fx.Graph()
    copy_signature(source.graph, graph)
    _Copier(source, graph, state).run()
    if prune:
        # The copy holds views that nobody may read: only pruning makes it small again.
        graph = functional(graph)
    for node in graph.nodes:
        if node.op == "get_attr" and node.target not in state:
            attach(module, node.target, fetch(source, node.target), persistent=False)
        if follows_mode(node):
            set_training(node, False)
    if prune:
        # Nodes with a side effect (an in-place fill of a mask) are kept by fx's own rule.
        graph.eliminate_dead_code()
    graph.lint()
    module.graph = graph
    module.eval()
    return module


class _Copier:
    """Copies a graph, inlines its subgraphs and drops what must not survive."""

    def __init__(
        self, source: fx.GraphModule, graph: fx.Graph, state: Mapping[str, torch.Tensor]
    ) -> None:
        self.source = source
        self.graph = graph
        self.state = state
        self.environment: dict[fx.Node, Any] = {}

    def run(self) -> None:
        for node in self.source.graph.nodes:
            self.copy(node, self.source)

    def copy(self, node: fx.Node, owner: fx.GraphModule) -> None:
        if node.target in _ASSERTIONS or node.op == "call_module":
            return
        if node.op == "get_attr" and self.is_subgraph(str(node.target), owner):
            return
        if node.target in _REGIONS:
            self.environment[node] = self.inline(node, owner)
            return
        argument = node.args[0] if node.args else None
        if (
            node.target is operator.getitem
            and isinstance(argument, fx.Node)
            and isinstance(self.environment.get(argument), tuple | list)
        ):
            self.environment[node] = self.environment[argument][node.args[1]]
            return
        if any(n not in self.environment for n in node.all_input_nodes):
            raise CaptureError(
                f"the graph holds a subgraph that cannot be inlined: {node.target}",
                where=where_of(node),
                why="torch.export keeps torch.cond and the like as subgraphs, in which neurons "
                "cannot be followed",
                how="write the forward pass without it, for instance with torch.where",
            )
        copied = self.graph.node_copy(node, lambda n: self.environment[n])
        copied.target = _WRITTEN.get(node.target, node.target)
        if copied.target is torch.ops.aten.zeros.default:
            copied.kwargs = {k: v for k, v in copied.kwargs.items() if k != "memory_format"}
        self.environment[node] = copied

    def is_subgraph(self, target: str, owner: fx.GraphModule) -> bool:
        return target not in self.state and isinstance(attrgetter(target)(owner), nn.Module)

    def inline(self, call: fx.Node, owner: fx.GraphModule) -> Any:
        subgraph, *operands = cast("tuple[fx.Node, ...]", call.args[_REGIONS[call.target] :])
        body = attrgetter(str(subgraph.target))(owner)
        inputs = iter(operands)
        for node in body.graph.nodes:
            if node.op == "placeholder":
                self.environment[node] = self.environment[next(inputs)]
            elif node.op == "output":
                return fx.map_arg(node.args[0], lambda n: self.environment[n])
            else:
                self.copy(node, body)
        return ()
