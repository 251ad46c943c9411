"""Weights of linear layers in eight bits, by torchao."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import fx, nn

from fxfuse.errors import CompileError, MissingDependencyError, OptionError
from fxfuse.graph.arguments import argument
from fxfuse.graph.example import first_line
from fxfuse.graph.tensors import fetch
from fxfuse.runtime.fold import attach_beside, forget_unread

aten = torch.ops.aten

#: Option of `fxfuse.compile` → torchao's configuration.
_CONFIGURATIONS = {
    "int8": "Int8WeightOnlyConfig",
    "int8_dynamic": "Int8DynamicActivationInt8WeightConfig",
}


def check_quantize(quantize: str | None) -> None:
    """Check that weights can be quantised in this way here.

    Raises:
        OptionError: There is no such way.
        MissingDependencyError: torchao is not installed.
    """
    if quantize is None:
        return
    if quantize not in _CONFIGURATIONS:
        raise OptionError(
            f"unknown quantize {quantize!r}",
            where="quantize",
            how=f"use one of {', '.join(map(repr, _CONFIGURATIONS))}",
        )
    if find_spec("torchao") is None:
        raise MissingDependencyError(
            "quantising needs torchao", where="quantize", how='pip install "fxfuse[quantize]"'
        )


def quantise(module: fx.GraphModule, quantize: str) -> None:
    """Quantise the weights of linear layers in place; what else reads one reads it as it was.

    Raises:
        OptionError: There is none.
        CompileError: torchao rejects them.
    """
    layers = [node for node in module.graph.nodes if _is_layer(node)]
    weights = list(dict.fromkeys(str(argument(node, "weight").target) for node in layers))
    if not weights:
        raise OptionError(
            "there is nothing to quantise",
            where=f"quantize={quantize!r}",
            why="torchao quantises linear layers, and the network has none",
            how="leave quantize out, or use dtype=torch.bfloat16",
        )
    # torchao looks for modules.
    modules = [_module(fetch(module, name)) for name in weights]
    torchao: Any = import_module("torchao.quantization")
    try:
        torchao.quantize_(nn.ModuleList(modules), getattr(torchao, _CONFIGURATIONS[quantize])())
    # It raises whatever its kernels do.
    except Exception as error:
        raise CompileError(
            f"torchao cannot quantise the network as {quantize!r}",
            why=first_line(error),
            how="leave quantize out, or use dtype=torch.bfloat16",
        ) from error
    made = {
        name: attach_beside(module, f"{name}_quantised", own.weight)
        for name, own in zip(weights, modules, strict=True)
    }
    for node in layers:
        with module.graph.inserting_before(node):
            read = module.graph.get_attr(made[str(argument(node, "weight").target)])
        node.args = (argument(node, "input"), read, argument(node, "bias"))
        # Which torchao has its own of.
        node.target, node.kwargs = nn.functional.linear, {}
    module.graph.eliminate_dead_code()
    forget_unread(module)
    module.recompile()


def _module(weight: torch.Tensor) -> nn.Linear:
    outputs, inputs = weight.shape
    module = nn.Linear(inputs, outputs, bias=False, device="meta")
    module.weight = nn.Parameter(weight.detach(), requires_grad=False)
    return module


def _is_layer(node: fx.Node) -> bool:
    return node.target is aten.linear.default and argument(node, "weight").op == "get_attr"
