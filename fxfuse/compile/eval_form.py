"""The graph of a network that will never train again: no mode, no batch counters, no dropout."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from fxfuse.errors import PassError
from fxfuse.rewrite import copy_graph, share_tensors, unswitch_training
from fxfuse.training_argument import TRAINING_ARGUMENT, follows_mode, set_eval

aten = torch.ops.aten

#: Operators that hand their input on in eval mode.
_DROPOUTS = (
    aten.dropout.default,
    aten.dropout_.default,
    aten.feature_dropout.default,
    aten.feature_dropout_.default,
    aten.alpha_dropout.default,
    aten.alpha_dropout_.default,
    aten.feature_alpha_dropout.default,
    aten.feature_alpha_dropout_.default,
)


def inference_copy(module: fx.GraphModule) -> fx.GraphModule:
    """A copy of a network with tensors of its own, which passes may change.

    Args:
        module: What `fuse`, `prune` or `stack` made, or another graph module.

    Returns:
        A plain graph module in eval mode, without gradients.
    """
    plain = fx.GraphModule({}, fx.Graph())
    share_tensors(module, plain)
    plain.graph = copy_graph(module.graph)
    plain.train(module.training)
    copied = copy.deepcopy(plain)
    return copied.requires_grad_(False)


class EvalForm(PassBase):
    """Writes the eval mode into the graph, whatever the module's mode is.

    requires: nothing.
    call: every `training` argument becomes False, and nothing counts batches.
    ensures: the graph does not read the module's mode.
    """

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Rewrites the graph in place."""
        graph = graph_module.graph
        modal = [n for n in graph.nodes if n.target == "training" or _is_modal(n)]
        unswitch_training(graph)
        for node in graph.nodes:
            if follows_mode(node):
                set_eval(node)
        graph_module.eval()
        graph_module.recompile()
        return PassResult(graph_module, bool(modal))

    def ensures(self, graph_module: fx.GraphModule) -> None:
        """Checks that the mode is gone."""
        graph_module.graph.lint()
        left = [n.name for n in graph_module.graph.nodes if _is_modal(n)]
        if left:
            raise PassError("operators still follow the module's mode", where=", ".join(left))


class RemoveDropout(PassBase):
    """Takes out dropout, which hands its input on in eval mode.

    requires: the eval form of the graph.
    call: whoever reads a dropout reads its input.
    ensures: no dropout is left.
    """

    def requires(self, graph_module: fx.GraphModule) -> None:
        """Checks that the graph does not follow the module's mode.

        Raises:
            PassError: It does.
        """
        require_eval_form(self, graph_module)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Rewrites the graph in place."""
        graph = graph_module.graph
        dropouts = [node for node in graph.nodes if node.target in _DROPOUTS]
        for node in dropouts:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        graph_module.recompile()
        return PassResult(graph_module, bool(dropouts))

    def ensures(self, graph_module: fx.GraphModule) -> None:
        """Checks that the graph is well formed."""
        graph_module.graph.lint()


def require_eval_form(by: PassBase, graph_module: fx.GraphModule) -> None:
    """Checks that a graph does not follow the module's mode.

    Raises:
        PassError: It does.
    """
    modal = [node.name for node in graph_module.graph.nodes if _is_modal(node)]
    if modal:
        raise PassError(
            f"{type(by).__name__} is for the eval form of a graph",
            where=", ".join(modal[:3]),
            why="these operators follow the module's mode or are in training mode",
            how="apply EvalForm first",
        )


def _is_modal(node: fx.Node) -> bool:
    """Whether an operator is in training mode, or reads the mode."""
    if not follows_mode(node):
        return False
    position = TRAINING_ARGUMENT[node.target]
    default: Any = node.target._schema.arguments[position].default_value  # type: ignore[union-attr]
    return (node.args[position] if position < len(node.args) else default) is not False
