"""The graph of a network that will never train again: no mode, no batch counters, no dropout."""

from __future__ import annotations

import copy

from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from fxfuse.errors import RewriteError
from fxfuse.graph.arguments import argument
from fxfuse.graph.operator_facts import FACTS, Dropout, follows_mode, in_training, set_training
from fxfuse.transform.emit import copy_graph, share_tensors, unswitch_training


def inference_copy(module: fx.GraphModule) -> fx.GraphModule:
    """Copy a network for passes that change it: own tensors, eval mode, without gradients."""
    plain = fx.GraphModule({}, fx.Graph())
    share_tensors(module, plain)
    plain.graph = copy_graph(module.graph)
    plain.train(module.training)
    copied = copy.deepcopy(plain)
    return copied.requires_grad_(False)


class WellFormed(PassBase):
    """A pass that leaves a well-formed graph."""

    def ensures(self, graph_module: fx.GraphModule) -> None:
        """Check that the graph is well formed."""
        graph_module.graph.lint()


class OfEvalForm(WellFormed):
    """A pass that is for the eval form of a graph."""

    def requires(self, graph_module: fx.GraphModule) -> None:
        """Check that the graph does not follow the module's mode."""
        modal = [node.name for node in graph_module.graph.nodes if in_training(node)]
        if modal:
            raise RewriteError(
                f"{type(self).__name__} needs the eval form of a graph",
                where=", ".join(modal[:3]),
                why="these operators follow the module's mode, or are in training mode",
                how="apply EvalForm first",
            )


class EvalForm(WellFormed):
    """Writes the eval mode into the graph, whatever the module's mode is.

    requires: nothing.
    call: every `training` argument becomes False, and nothing counts batches.
    ensures: the graph does not read the module's mode, and is well formed.
    """

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Rewrite the graph in place."""
        graph = graph_module.graph
        modal = [n for n in graph.nodes if n.target == "training" or in_training(n)]
        unswitch_training(graph)
        for node in graph.nodes:
            if follows_mode(node):
                set_training(node, False)
        graph_module.eval()
        graph_module.recompile()
        return PassResult(graph_module, bool(modal))

    def ensures(self, graph_module: fx.GraphModule) -> None:
        """Check that the mode is gone."""
        super().ensures(graph_module)
        left = [n.name for n in graph_module.graph.nodes if in_training(n)]
        if left:
            raise RewriteError("operators still follow the module's mode", where=", ".join(left))


class RemoveDropout(OfEvalForm):
    """Takes out dropout, which hands its input on in eval mode.

    requires: the eval form of the graph.
    call: whoever reads a dropout reads its input.
    ensures: the graph is well formed.
    """

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Rewrite the graph in place."""
        graph = graph_module.graph
        before = len(graph.nodes)
        for node in graph.nodes:
            facts = FACTS.get(node.target)
            if isinstance(facts, Dropout):
                node.replace_all_uses_with(argument(node, facts.input))
                graph.erase_node(node)
        graph_module.recompile()
        return PassResult(graph_module, len(graph.nodes) < before)
