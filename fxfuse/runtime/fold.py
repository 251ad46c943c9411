"""Batch norms folded into the layers before them."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassResult
from torch.nn.utils.fusion import fuse_conv_bn_weights

from fxfuse.analysis.rules.registry import argument_of
from fxfuse.graph.tensors import attach, fetch, named_tensors
from fxfuse.runtime.eval_form import OfEvalForm

aten = torch.ops.aten

#: Layers whose outputs of dimension 1 are rows of their weight, and of transposed ones columns.
_LAYERS = (
    aten.conv1d.default,
    aten.conv1d.padding,
    aten.conv2d.default,
    aten.conv2d.padding,
    aten.conv3d.default,
    aten.conv3d.padding,
    aten.linear.default,
)
_TRANSPOSED = (
    aten.conv_transpose1d.default,
    aten.conv_transpose2d.input,
    aten.conv_transpose3d.input,
)
_BATCH_NORM = aten.batch_norm.default
_STATE = ("weight", "bias", "running_mean", "running_var")


class FoldBatchNorm(OfEvalForm):
    """Folds batch norms into the convolution or linear layer whose result only they read.

    requires: the eval form of the graph.
    call: weight and bias of the layer take the scale and the shift over. A tensor that something
        else reads as well stays, and the layer gets one of its own.
    ensures: the graph is well formed.
    """

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Rewrites the graph, and the module's tensors, in place."""
        graph = graph_module.graph
        norms = [node for node in graph.nodes if node.target is _BATCH_NORM]
        folded = [norm for norm in norms if _fold(graph_module, norm)]
        graph.eliminate_dead_code()
        _forget_unread(graph_module)
        graph_module.recompile()
        return PassResult(graph_module, bool(folded))


def _fold(module: fx.GraphModule, norm: fx.Node) -> bool:
    """Folds one batch norm; False where it must stay."""
    layer: Any = norm.args[0]
    if layer.target not in (*_LAYERS, *_TRANSPOSED) or len(layer.users) > 1:
        return False
    transposed = layer.target in _TRANSPOSED
    if transposed and _given(layer, "groups") != 1:
        return False
    weight, bias = _given(layer, "weight"), _given(layer, "bias")
    state = [_given(norm, name) for name in _STATE]
    tensors = [_tensor(module, node) for node in (weight, bias, *state)]
    nodes = (weight, bias, *state)
    known = all(t is not None or n is None for t, n in zip(tensors, nodes, strict=True))
    kernel, shift, gamma, beta, mean, variance = tensors
    if not known or kernel is None or mean is None or variance is None:
        return False
    if layer.target is aten.linear.default and not _is_matrix(layer):
        return False
    epsilon = _given(norm, "eps")
    new_weight, new_bias = fuse_conv_bn_weights(
        kernel, shift, mean, variance, epsilon, gamma, beta, transposed
    )
    name = str(weight.target)
    beside = f"{name.rpartition('.')[0]}.bias".lstrip(".") if bias is None else str(bias.target)
    with module.graph.inserting_before(layer):
        made = [
            module.graph.get_attr(_attached(module, own, tensor.detach()))
            for own, tensor in ((name, new_weight), (beside, new_bias))
        ]
    _replace(layer, "weight", made[0])
    _replace(layer, "bias", made[1])
    norm.replace_all_uses_with(layer)
    module.graph.erase_node(norm)
    return True


def _given(node: fx.Node, name: str) -> Any:
    return argument_of(node, name, node.args, node.kwargs)


def _replace(node: fx.Node, name: str, value: fx.Node) -> None:
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    position = names.index(name)
    if position < len(node.args):
        node.update_arg(position, value)
    elif position == len(node.args):
        node.args = (*node.args, value)
    else:
        node.update_kwarg(name, value)


def _tensor(module: fx.GraphModule, node: Any) -> torch.Tensor | None:
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    return fetch(module, str(node.target))


def _is_matrix(layer: fx.Node) -> bool:
    """Whether a linear layer's outputs lie along dimension 1, where a batch norm looks."""
    value = layer.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dim() == 2


def _attached(module: fx.GraphModule, name: str, tensor: torch.Tensor) -> str:
    """Registers a parameter under a free name like the given one."""
    taken = {own for own, _ in named_tensors(module)}
    made = f"{name}_folded"
    while made in taken:
        made += "_"
    attach(module, made, torch.nn.Parameter(tensor, requires_grad=False), persistent=True)
    return made


def _forget_unread(module: fx.GraphModule) -> None:
    """Drops the tensors that no node reads any more."""
    read = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    for name, _ in list(named_tensors(module)):
        if name not in read:
            prefix, _, leaf = name.rpartition(".")
            delattr(module.get_submodule(prefix), leaf)
