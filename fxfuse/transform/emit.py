"""torch.fx passes: a captured graph and fused tensors become a module.

capture → analyze → plan → apply → **rewrite** → verify → compile. At member width the graph is the
members' graph; what is rewritten is how it behaves in training (`SwitchTraining`), and where the
tensors lie that it creates (`FollowDevice`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import fx, nn
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from fxfuse.errors import RewriteError
from fxfuse.graph.allowed import count_batch
from fxfuse.graph.arguments import argument
from fxfuse.graph.capture import Program
from fxfuse.graph.fixed_batch import check_sizes, fixed_sizes, uncheck_sizes
from fxfuse.graph.operator_facts import batch_norm_of, follows_mode, set_training, training_of
from fxfuse.graph.tensors import attach, named_tensors
from fxfuse.graph.torch_compat import copy_signature, pytree

#: Last parts of the names of a batch norm's buffers.
MEAN, COUNTER = "running_mean", "num_batches_tracked"


class FusedModule(fx.GraphModule):
    """A fused network: trainable, picklable, exportable, compilable.

    Normalisation and dropout follow `train()` and `eval()` through a `training` node in the graph,
    on which `torch.compile` guards.
    """

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Pickles the eval form of the graph; unpickling traces it and would bake the mode in."""
        plain = fx.GraphModule({}, fx.Graph())
        share_tensors(self, plain)
        plain.graph = copy_graph(self.graph)
        unswitch_training(plain.graph)
        sizes = uncheck_sizes(plain.graph)
        plain.recompile()
        return _restore, (plain, self.training, dict(self.meta), sizes)


def emit(program: Program, state: Mapping[str, torch.Tensor]) -> FusedModule:
    """Make a module in eval mode of a captured graph and tensors of the members' shapes."""
    return emit_graph(program, state, copy_graph(program.graph))


def member_name(program: Program, member: int, name: str) -> str:
    """Name, in the fused network, of a tensor of which each member has its own."""
    prefix = "members"
    while any(n.split(".", 1)[0] == prefix for n in program.names):
        prefix += "_"
    return f"{prefix}.{member}.{name}"


def emit_graph(
    program: Program,
    state: Mapping[str, torch.Tensor],
    graph: fx.Graph,
    constants: Mapping[str, torch.Tensor] = MappingProxyType({}),
    own: Mapping[str, Sequence[torch.Tensor]] = MappingProxyType({}),
) -> FusedModule:
    """Make a module of a rewritten copy of a captured graph; take the graph over.

    Args:
        program: A captured member.
        state: Tensors by `state_dict()` name; tied names share one tensor.
        graph: The graph.
        constants: Tensors that the graph reads beside the members', by name.
        own: Tensors that take the place of one in `state`, one for each member, by canonical name;
            the graph reads them as `member_name` says.
    """
    program.require_exported()
    module = FusedModule({}, fx.Graph())
    registered: dict[str, torch.Tensor] = {}
    for name, first, written, tensor in _written(program, state, own):
        template = program.tensor(name)
        if first not in registered:
            tensor = _laid_out(tensor, template)
            if isinstance(template, nn.Parameter):
                tensor = nn.Parameter(tensor, requires_grad=template.requires_grad)
            registered[first] = tensor
        attach(module, written, registered[first], persistent=True)
    known = {name for name, _ in named_tensors(module)}
    for node in graph.nodes:
        if node.op == "get_attr" and node.target not in known:
            name = str(node.target)
            constant = constants[name] if name in constants else program.tensor(name)
            attach(module, name, constant.detach().clone(), persistent=False)
            known.add(name)
    check_sizes(graph, fixed_sizes(graph))
    module.graph = graph
    SwitchTraining()(module)
    FollowDevice()(module)
    module.eval()
    return module


def _laid_out(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A tensor with its channels innermost, where those of a member's are."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    layout = formats.get(like.dim())
    if layout is None or like.is_contiguous() or tensor.dim() != like.dim():
        return tensor
    innermost = like.is_contiguous(memory_format=layout)
    return tensor.contiguous(memory_format=layout) if innermost else tensor


def _written(
    program: Program,
    state: Mapping[str, torch.Tensor],
    own: Mapping[str, Sequence[torch.Tensor]],
) -> Iterator[tuple[str, str, str, torch.Tensor]]:
    """Each tensor of a network: a member's name, the first of tied names, its name, and it."""
    for name in program.names:
        first = program.canonical[name]
        if first not in own:
            yield name, first, name, state[name]
            continue
        for member, tensor in enumerate(own[first]):
            first_written = member_name(program, member, first)
            yield name, first_written, member_name(program, member, name), tensor


def copy_graph(graph: fx.Graph, mapping: dict[fx.Node, fx.Node] | None = None) -> fx.Graph:
    """Return a copy of a graph; `mapping` is filled with old node → new node."""
    copy = fx.Graph()
    result = copy.graph_copy(graph, {} if mapping is None else mapping)
    copy.output(result)
    copy_signature(graph, copy)
    return copy


def share_tensors(source: nn.Module, target: nn.Module) -> None:
    """Register the tensors of one module in another, the very objects, under the same names."""
    persistent = set(source.state_dict())
    for name, tensor in named_tensors(source):
        attach(target, name, tensor, persistent=name in persistent)


class SwitchTraining(PassBase):
    """Makes operators that behave differently in training follow the module's mode.

    requires: every `training` argument is a literal (the captured eval form).
    call: one `get_attr` node reads `self.training`; BatchNorm counts its batches.
    ensures: no literal `training` argument is left, and the graph is well formed.
    """

    def requires(self, graph_module: fx.GraphModule) -> None:
        """Check that the graph is in its eval form."""
        for node in _modal_nodes(graph_module.graph):
            if isinstance(training_of(node), fx.Node):
                raise RewriteError(
                    "the graph already follows the module's mode",
                    where=node.name,
                    how="apply SwitchTraining once, to a captured graph",
                )

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Rewrite the graph in place."""
        graph = graph_module.graph
        nodes = _modal_nodes(graph)
        if not nodes:
            return PassResult(graph_module, False)
        with graph.inserting_before(next(iter(graph.nodes))):
            # Not graph.get_attr, which expects a tensor or a submodule and warns.
            training = graph.create_node("get_attr", "training")
        buffers = dict(graph_module.named_buffers(remove_duplicate=False))
        for node in nodes:
            set_training(node, training)
            counter = _counter_of(node)
            if counter in buffers:
                with graph.inserting_before(node):
                    graph.call_function(count_batch, (graph.get_attr(counter), training))
        graph_module.recompile()
        return PassResult(graph_module, True)

    def ensures(self, graph_module: fx.GraphModule) -> None:
        """Check that every mode is read from the module."""
        graph_module.graph.lint()
        literal = [
            node.name
            for node in _modal_nodes(graph_module.graph)
            if not isinstance(training_of(node), fx.Node)
        ]
        if literal:
            raise RewriteError("a training argument is still a literal", where=", ".join(literal))


class FollowDevice(PassBase):
    """Makes tensors that a graph creates lie where its inputs do.

    requires: nothing.
    call: every device that was written down in the capture becomes that of the first tensor input.
    ensures: no device is written down, where the graph has a tensor input.
    """

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Rewrite the graph in place."""
        graph = graph_module.graph
        written = _with_device(graph)
        anchor = next((node for node in graph.nodes if _is_tensor_input(node)), None)
        if not written or anchor is None:
            return PassResult(graph_module, False)
        with graph.inserting_after(graph.find_nodes(op="placeholder")[-1]):
            device = graph.call_function(getattr, (anchor, "device"))
        for node in written:
            node.args, node.kwargs = pytree.tree_map_only(
                torch.device, lambda _: device, (node.args, dict(node.kwargs))
            )
        graph_module.recompile()
        return PassResult(graph_module, True)

    def ensures(self, graph_module: fx.GraphModule) -> None:
        """Check that no device is left."""
        graph_module.graph.lint()
        left = [node.name for node in _with_device(graph_module.graph)]
        if left and any(_is_tensor_input(node) for node in graph_module.graph.nodes):
            raise RewriteError("a device is still a literal", where=", ".join(left))


def _with_device(graph: fx.Graph) -> list[Any]:
    """Return the operators that are told a device."""
    return [
        node
        for node in graph.nodes
        if node.op == "call_function"
        and any(isinstance(x, torch.device) for x in pytree.tree_leaves((node.args, node.kwargs)))
    ]


def _is_tensor_input(node: fx.Node) -> bool:
    return node.op == "placeholder" and isinstance(node.meta.get("val"), torch.Tensor)


def _modal_nodes(graph: fx.Graph) -> list[Any]:
    return [node for node in graph.nodes if follows_mode(node)]


def unswitch_training(graph: fx.Graph) -> None:
    """Take `SwitchTraining` back: the eval form of the graph."""
    for node in reversed(list(graph.nodes)):
        if node.target is count_batch:
            counter = node.args[0]
            graph.erase_node(node)
            graph.erase_node(counter)
        elif follows_mode(node):
            set_training(node, False)
        elif node.op == "get_attr" and node.target == "training":
            graph.erase_node(node)


def _counter_of(node: fx.Node) -> str:
    norm = batch_norm_of(node)
    mean = None if norm is None else argument(node, norm.mean)
    if not isinstance(mean, fx.Node) or not str(mean.target).endswith(MEAN):
        return ""
    return str(mean.target).removesuffix(MEAN) + COUNTER


def _restore(
    plain: fx.GraphModule, training: bool, meta: Mapping[str, Any], sizes: Mapping[str, int]
) -> FusedModule:
    module = FusedModule({}, fx.Graph())
    share_tensors(plain, module)
    graph = copy_graph(plain.graph)
    check_sizes(graph, sizes)
    module.graph = graph
    SwitchTraining()(module)
    module.train(training)
    module.meta.update(meta)
    return module
