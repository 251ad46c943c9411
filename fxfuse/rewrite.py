"""torch.fx passes: a captured graph and fused tensors become a module.

capture → analyze → plan → apply → **rewrite** → verify → compile. At member width the graph is the
members' graph; what is rewritten is how it behaves in training (`SwitchTraining`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import fx, nn
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from fxfuse.capture import Captured
from fxfuse.errors import RewriteError
from fxfuse.tensors import attach
from fxfuse.training_argument import TRAINING_ARGUMENT, follows_mode

_BATCH_NORM = torch.ops.aten.batch_norm.default
#: Last parts of the names of a batch norm's buffers.
MEAN, COUNTER = "running_mean", "num_batches_tracked"


def count_batch(counter: torch.Tensor, training: bool) -> None:
    """Counts a batch in training, as `nn.BatchNorm` does.

    Args:
        counter: int64 [].
        training: Whether the module is in training mode.
    """
    if training:
        counter.add_(1)


class FusedModule(fx.GraphModule):
    """A fused network: trainable, picklable, exportable, compilable.

    Normalisation and dropout follow `train()` and `eval()` through a `training` node in the graph,
    on which `torch.compile` guards.
    """

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Pickles the eval form of the graph; unpickling traces it and would bake the mode in."""
        plain = fx.GraphModule({}, fx.Graph())
        _share_tensors(self, plain)
        plain.graph = copy_graph(self.graph)
        _unswitch_training(plain.graph)
        plain.recompile()
        return _restore, (plain, self.training, dict(self.meta))


def emit(captured: Captured, state: Mapping[str, torch.Tensor]) -> FusedModule:
    """Makes a module of a captured graph and tensors of the members' names and shapes.

    Args:
        captured: A captured member.
        state: Tensors by `state_dict()` name; tied names share one tensor.

    Returns:
        A module in eval mode that owns `state`.

    Raises:
        NotEmittedError: The captured graph is a trace, which holds for its example only.
    """
    return emit_graph(captured, state, copy_graph(captured.graph))


def emit_graph(
    captured: Captured,
    state: Mapping[str, torch.Tensor],
    graph: fx.Graph,
    constants: Mapping[str, torch.Tensor] = MappingProxyType({}),
) -> FusedModule:
    """Makes a module of a rewritten copy of a captured graph; takes the graph over.

    Raises:
        NotEmittedError: The captured graph is a trace, which holds for its example only.
    """
    captured.require_program()
    module = FusedModule({}, fx.Graph())
    registered: dict[str, torch.Tensor] = {}
    for name in captured.names:
        first = captured.canonical[name]
        template = captured.tensor(name)
        if first not in registered:
            tensor = state[name]
            if isinstance(template, nn.Parameter):
                tensor = nn.Parameter(tensor, requires_grad=template.requires_grad)
            registered[first] = tensor
        attach(module, name, registered[first], persistent=True)
    for node in graph.nodes:
        if node.op == "get_attr" and node.target not in captured.canonical:
            name = str(node.target)
            constant = constants[name] if name in constants else captured.tensor(name)
            attach(module, name, constant.detach().clone(), persistent=False)
    module.graph = graph
    SwitchTraining()(module)
    module.eval()
    return module


def copy_graph(graph: fx.Graph, mapping: dict[fx.Node, fx.Node] | None = None) -> fx.Graph:
    """A copy of a graph; `mapping` is filled with old node → new node."""
    copy = fx.Graph()
    result = copy.graph_copy(graph, {} if mapping is None else mapping)
    copy.output(result)
    copy._codegen = graph._codegen
    return copy


def _share_tensors(source: nn.Module, target: nn.Module) -> None:
    persistent = set(source.state_dict())
    for name, tensor in [
        *source.named_parameters(remove_duplicate=False),
        *source.named_buffers(remove_duplicate=False),
    ]:
        attach(target, name, tensor, persistent=name in persistent)


class SwitchTraining(PassBase):
    """Makes operators that behave differently in training follow the module's mode.

    requires: every `training` argument is a literal (the captured eval form).
    call: one `get_attr` node reads `self.training`; BatchNorm counts its batches.
    ensures: no literal `training` argument is left, and the graph is well formed.
    """

    def requires(self, graph_module: fx.GraphModule) -> None:
        """Checks that the graph is in its eval form.

        Raises:
            RewriteError: A `training` argument is a node already.
        """
        for node in _modal_nodes(graph_module.graph):
            if isinstance(node.args[TRAINING_ARGUMENT[node.target]], fx.Node):
                raise RewriteError(
                    "the graph follows the module's mode already",
                    where=node.name,
                    how="apply SwitchTraining to a captured graph, once",
                )

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Rewrites the graph in place."""
        graph = graph_module.graph
        nodes = _modal_nodes(graph)
        if not nodes:
            return PassResult(graph_module, False)
        with graph.inserting_before(next(iter(graph.nodes))):
            # Not graph.get_attr, which expects a tensor or a submodule and warns.
            training = graph.create_node("get_attr", "training")
        buffers = dict(graph_module.named_buffers(remove_duplicate=False))
        for node in nodes:
            node.update_arg(TRAINING_ARGUMENT[node.target], training)
            counter = _counter_of(node)
            if counter in buffers:
                with graph.inserting_before(node):
                    graph.call_function(count_batch, (graph.get_attr(counter), training))
        graph_module.recompile()
        return PassResult(graph_module, True)

    def ensures(self, graph_module: fx.GraphModule) -> None:
        """Checks that every mode is read from the module."""
        graph_module.graph.lint()
        literal = [
            node.name
            for node in _modal_nodes(graph_module.graph)
            if not isinstance(node.args[TRAINING_ARGUMENT[node.target]], fx.Node)
        ]
        if literal:
            raise RewriteError("a training argument is still a literal", where=", ".join(literal))


def _modal_nodes(graph: fx.Graph) -> list[Any]:
    return [node for node in graph.nodes if follows_mode(node)]


def _unswitch_training(graph: fx.Graph) -> None:
    """Takes `SwitchTraining` back: the eval form of the graph."""
    for node in reversed(list(graph.nodes)):
        if node.target is count_batch:
            counter = node.args[0]
            graph.erase_node(node)
            graph.erase_node(counter)
        elif follows_mode(node):
            node.update_arg(TRAINING_ARGUMENT[node.target], False)
        elif node.op == "get_attr" and node.target == "training":
            graph.erase_node(node)


def _counter_of(node: fx.Node) -> str:
    mean = node.args[3] if node.target is _BATCH_NORM else None
    if not isinstance(mean, fx.Node) or not str(mean.target).endswith(MEAN):
        return ""
    return str(mean.target).removesuffix(MEAN) + COUNTER


def _restore(plain: fx.GraphModule, training: bool, meta: Mapping[str, Any]) -> FusedModule:
    module = FusedModule({}, fx.Graph())
    _share_tensors(plain, module)
    graph = copy_graph(plain.graph)
    module.graph = graph
    SwitchTraining()(module)
    module.train(training)
    module.meta.update(meta)
    return module
