"""Images with channels as the innermost dimension, which convolutions on many devices prefer."""

from __future__ import annotations

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from fxfuse.graph.functional import is_write
from fxfuse.graph.operator_facts import Convolution, operators
from fxfuse.runtime.eval_form import WellFormed

aten = torch.ops.aten

_CONVOLUTIONS = operators(Convolution, space=2)
_IMAGE = 4


class ChannelsLast(WellFormed):
    """Keeps two-dimensional convolutions and their inputs in `torch.channels_last`.

    requires: nothing.
    call: weights and images that the graph is given are laid out anew; a `view`, which memory laid
        out otherwise may reject, becomes a `reshape`. A graph that writes into tensors is left
        alone, because a write through a view could be lost.
    ensures: the graph is well formed.
    """

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Rewrite the graph, and lay the module's tensors out anew, in place."""
        graph = graph_module.graph
        layers = [node for node in graph.nodes if node.target in _CONVOLUTIONS]
        if not layers or any(is_write(node) for node in graph.nodes):
            return PassResult(graph_module, False)
        graph_module.to(memory_format=torch.channels_last)
        for node in list(graph.nodes):
            if node.target is aten.view.default:
                node.target = aten.reshape.default
            if node.op == "placeholder" and _is_image(node):
                with graph.inserting_after(node):
                    laid_out = graph.call_function(
                        aten.contiguous.default,
                        (node,),
                        {"memory_format": torch.channels_last},
                    )
                laid_out.meta = dict(node.meta)
                node.replace_all_uses_with(laid_out, lambda user, own=laid_out: user is not own)
        graph_module.recompile()
        return PassResult(graph_module, True)


def _is_image(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dim() == _IMAGE and value.is_floating_point()
