"""The network and example inputs that a caller means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx

from fxfuse.errors import OptionError
from fxfuse.refine.fused import Fused


def resolve_inputs(
    network: Fused | fx.GraphModule, inputs: Any, kwargs: Mapping[str, Any] | None
) -> tuple[fx.GraphModule, tuple[Any, ...], dict[str, Any]]:
    """Find a network's module and example inputs: those given, else those it was fused with."""
    module = network if isinstance(network, fx.GraphModule) else network.module
    if inputs is not None or kwargs is not None:
        args = () if inputs is None else inputs if isinstance(inputs, tuple) else (inputs,)
        return module, args, dict(kwargs or {})
    if not isinstance(network, fx.GraphModule):
        return module, *network.graph.program.example_inputs
    raise OptionError(
        "example_inputs are missing",
        why="the result is run on them and compared with the network",
        how="pass example_inputs, as to fxfuse.fuse",
    )
