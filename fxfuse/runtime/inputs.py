"""The network and example inputs that a caller means."""

from __future__ import annotations

from typing import Any

from torch import fx

from fxfuse.common.options import described
from fxfuse.errors import OptionError
from fxfuse.graph.example import Example
from fxfuse.refine.fused import Fused


def resolve_inputs(network: Fused | fx.GraphModule, example: Any) -> tuple[fx.GraphModule, Example]:
    """Find a network's module and example inputs: those given, else those it was fused with.

    Raises:
        OptionError: This is not a fused network or a graph, or there are no example inputs.
    """
    if not isinstance(network, fx.GraphModule | Fused):
        raise OptionError(
            f"{described(network)} is not a fused network",
            where="network",
            how="pass what fuse, prune or stack returned, or fxfuse.capture(network, "
            "example).module for a network of your own",
        )
    module = network if isinstance(network, fx.GraphModule) else network.module
    if example is not None:
        return module, Example.of(example)
    if not isinstance(network, fx.GraphModule):
        return module, Example(*network.graph.program.example_inputs)
    raise OptionError(
        "example inputs are missing",
        why="the result is run on them and compared with the network itself",
        how="pass example, as to fxfuse.fuse",
    )
