"""Batch norms folded into the layers before them."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassResult
from torch.nn.utils.fusion import fuse_conv_bn_weights

from fxfuse.graph.arguments import argument, set_argument
from fxfuse.graph.operator_facts import FACTS, Contraction, batch_norm_of
from fxfuse.graph.tensors import attach, fetch, named_tensors
from fxfuse.runtime.eval_form import OfEvalForm


class FoldBatchNorm(OfEvalForm):
    """Folds batch norms into the convolution or linear layer whose result only they read.

    requires: the eval form of the graph.
    call: weight and bias of the layer take the scale and the shift over. A tensor that something
        else reads as well stays, and the layer gets one of its own.
    ensures: the graph is well formed.
    """

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Rewrite the graph, and the module's tensors, in place."""
        graph = graph_module.graph
        folded = [node for node in list(graph.nodes) if _fold(graph_module, node)]
        graph.eliminate_dead_code()
        forget_unread(graph_module)
        graph_module.recompile()
        return PassResult(graph_module, bool(folded))


def _fold(module: fx.GraphModule, norm: fx.Node) -> bool:
    """Folds a node that is a batch norm into the layer before it; False where it must stay."""
    batch_norm = batch_norm_of(norm)
    if batch_norm is None:
        return False
    layer: fx.Node = argument(norm, batch_norm.input)
    facts = FACTS.get(layer.target)
    if not isinstance(facts, Contraction) or len(layer.users) > 1:
        return False
    # What addmm adds need not be a bias, and groups lie along the inputs of a transposed weight.
    if facts.transposed and argument(layer, facts.groups) != 1:
        return False
    weight, bias = argument(layer, facts.weight), argument(layer, facts.bias)
    nodes = (weight, bias, *(argument(norm, name) for name in batch_norm.state))
    tensors = [_tensor(module, node) for node in nodes]
    known = all(t is not None or n is None for t, n in zip(tensors, nodes, strict=True))
    kernel, shift, gamma, beta, mean, variance = tensors
    if not known or kernel is None or mean is None or variance is None:
        return False
    if not facts.space and not _is_matrix(layer):
        return False
    epsilon = argument(norm, batch_norm.eps)
    new_weight, new_bias = fuse_conv_bn_weights(
        kernel, shift, mean, variance, epsilon, gamma, beta, facts.transposed
    )
    name = str(weight.target)
    beside = f"{name.rpartition('.')[0]}.bias".lstrip(".") if bias is None else str(bias.target)
    with module.graph.inserting_before(layer):
        made = [
            module.graph.get_attr(attach_beside(module, f"{own}_folded", tensor.detach()))
            for own, tensor in ((name, new_weight), (beside, new_bias))
        ]
    set_argument(layer, facts.weight, made[0])
    set_argument(layer, facts.bias, made[1])
    norm.replace_all_uses_with(layer)
    module.graph.erase_node(norm)
    return True


def _tensor(module: fx.GraphModule, node: Any) -> torch.Tensor | None:
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    return fetch(module, str(node.target))


def _is_matrix(layer: fx.Node) -> bool:
    """Tell whether a linear layer's outputs lie along dimension 1, where a batch norm looks."""
    value = layer.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dim() == 2


def attach_beside(module: fx.GraphModule, name: str, tensor: torch.Tensor) -> str:
    """Register a parameter under a free name like the given one, and return that."""
    taken = {own for own, _ in named_tensors(module)}
    while name in taken:
        name += "_"
    attach(module, name, torch.nn.Parameter(tensor, requires_grad=False), persistent=True)
    return name


def forget_unread(module: fx.GraphModule) -> None:
    """Drop the tensors that no node reads any more."""
    read = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    for name, _ in list(named_tensors(module)):
        if name not in read:
            prefix, _, leaf = name.rpartition(".")
            delattr(module.get_submodule(prefix), leaf)
