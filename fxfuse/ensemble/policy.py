"""Which lowerings pay on which device: the one place that knows about speed.

Every other file only knows what is correct. Figures: docs/adr/0013-stack-forms.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from fxfuse.analysis.rules import concrete_shape
from fxfuse.graph.arguments import argument
from fxfuse.graph.operator_facts import FACTS, Convolution


@dataclass(frozen=True)
class Policy:
    """What pays on one type of device.

    Attributes:
        copied: Largest activation in bytes, of all members at the example's sizes, that is copied
            into one tensor so that the next layer can be one call.
        grouped: Largest number of outputs for one example that the convolutions of a network may
            have to be grouped ones for all members, where the example holds one.
        batches: Whether they are grouped for larger batches too.
        dense: Whether also convolutions over several channels and pixels at once are grouped.
        products: Of an ensemble inside a compiled graph whose weights are constants: largest number
            of products that a member's layer may take so that the members' layers are one.
        parameters: Whether they are one, too, where the weights are inputs of that graph, so that
            they are put together at every call.
    """

    copied: int
    grouped: int
    batches: bool = False
    dense: bool = False
    products: int = 0
    parameters: bool = False

    def pays_copy(self, node: fx.Node, n_members: int) -> bool:
        """Tell whether the members' values of a node may be copied into one tensor."""
        tensor = node.meta["val"]
        size = math.prod(concrete_shape(tensor)) * tensor.element_size()
        return bool(n_members * size <= self.copied)

    def pays_within(self, layers: Sequence[fx.Node]) -> bool:
        """Tell whether members in a compiled graph are to be one, by the first one's layers."""
        weights = [argument(node, "weight") for node in layers]
        if any(weight.op != "get_attr" for weight in weights):
            return self.parameters
        sizes = (math.prod(concrete_shape(weight.meta["val"])) for weight in weights)
        rows = (math.prod(concrete_shape(node.meta["val"])[:-1]) for node in layers)
        return all(size * n <= self.products for size, n in zip(sizes, rows, strict=True))

    def groups_convolutions(self, graph: fx.Graph, *, single: bool) -> bool:
        """Tell whether a network's convolutions are run for all members at once, as grouped ones.

        All or none, since going back and forth would copy every activation. The first ones, which
        read what all members share, do not count.
        """
        if not (single or self.batches):
            return False
        inputs = {node for node in graph.nodes if node.op == "placeholder"}
        layers = ((node, FACTS.get(node.target)) for node in graph.nodes)
        return all(
            self._pays_group(node, facts)
            for node, facts in layers
            if isinstance(facts, Convolution) and argument(node, facts.input) not in inputs
        )

    def _pays_group(self, node: fx.Node, facts: Convolution) -> bool:
        if facts.transposed:
            return False
        weight, outputs = argument(node, facts.weight).meta["val"], node.meta["val"]
        _, channels, *kernel = concrete_shape(weight)
        light = self.dense or channels == 1 or math.prod(kernel) == 1
        return light and math.prod(concrete_shape(outputs)[1:]) <= self.grouped


#: Measured on an AMD EPYC, one thread, four members, float32. What a lowering of a linear layer
#: saves is a few microseconds a call, as long as it takes to copy some hundred kilobytes. Depthwise
#: and pointwise convolutions are faster grouped for a single image: a network of them takes 0.7 of
#: the time at 64 x 64 pixels, 0.9 at 160 x 160, but 1.1 at 224 x 224. For a batch of 16 it takes
#: 1.3 to 3 times as long, and so do dense convolutions. Within a graph that inductor compiles with
#: constant weights, four MLPs of width 64 to 256 take 0.4 to 0.9 of the time for a batch of 1 or 4,
#: and up to 1.4 of it where there is more to compute; where weights are inputs, 1.1 to 2.3 of it.
_CPU = Policy(copied=256 * 1024, grouped=512 * 1024, products=1 << 20)

#: By type of device. None but the CPU was measured: others are treated like it.
_POLICIES: Mapping[str, Policy] = {"cpu": _CPU}


def policy_of(device: torch.device) -> Policy:
    """Return the policy of a device."""
    return _POLICIES.get(device.type, _CPU)
