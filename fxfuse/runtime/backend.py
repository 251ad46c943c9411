"""`torch.compile(ensemble, backend="fxfuse")`: an ensemble runs as one, and loses nothing.

The graph that Dynamo passes on has the parameters among its inputs, so no weight is known and
nothing can be transplanted here: this is the lossless form of `fxfuse.stack` only. Weights that are
inputs would have to be put together at every call, which costs more than it brings on the devices
that were measured; with `torch._inductor.config.freezing` they are constants, put together once.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from fxfuse.ensemble.policy import policy_of
from fxfuse.errors import OptionError
from fxfuse.graph.example import first_line
from fxfuse.graph.torch_compat import (
    FakeTensor,
    compile_with_inductor,
    copy_origin,
    is_region,
    lookup_backend,
    make_fx,
)
from fxfuse.runtime.prepare import inductor_options
from fxfuse.runtime.stack_branches import StackBranches

_INNER = "inductor"


def fxfuse_backend(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """A backend of `torch.compile`: members of an ensemble run together, then another backend.

    Args:
        graph_module: What Dynamo captured.
        example_inputs: Its inputs.
        mode: Of `torch.compile`, for inductor.
        options: `backend`: who compiles what comes out, `inductor` if it is left out. `always`:
            whether members run together also where that is not known to be faster. The rest are
            inductor's options.

    Returns:
        What the other backend returns.
    """
    told = dict(options or {})
    inner = told.pop("backend", _INNER)
    if inner == "fxfuse" or inner not in torch.compiler.list_backends(exclude_tags=()):
        raise OptionError(
            f"unknown backend {inner!r}",
            where="options['backend']",
            how="use a backend of torch.compile",
        )
    always = bool(told.pop("always", False))
    traced = _traced(graph_module) if always or _may_pay(graph_module) else None
    stacked = None if traced is None else StackBranches(always=always)(traced)
    module = stacked.graph_module if stacked is not None and stacked.modified else graph_module
    if inner != _INNER:
        if told or mode is not None:
            raise OptionError(
                f"the backend {inner!r} takes no options", how="give it 'backend' alone"
            )
        compiled: Callable[..., Any] = lookup_backend(inner)(module, list(example_inputs))
        return compiled
    return compile_with_inductor(module, example_inputs, inductor_options(mode, told))


def _may_pay(graph_module: fx.GraphModule) -> bool:
    """Tell whether it is worth tracing Dynamo's graph, which takes as long as capturing it did."""
    nodes = list(graph_module.graph.nodes)
    examples = (n.meta.get("example_value") for n in nodes if n.op == "placeholder")
    devices = {x.device for x in examples if isinstance(x, torch.Tensor)}
    constant = any(node.op in ("get_attr", "call_module") for node in nodes)
    return constant or any(policy_of(device).parameters for device in devices)


def _traced(graph_module: fx.GraphModule) -> fx.GraphModule | None:
    """Dynamo's graph in ATen operators, composite ones undecomposed; None where that fails."""
    given = [n for n in graph_module.graph.nodes if n.op == "placeholder"]
    fakes = [n.meta.get("example_value") for n in given]
    # Of the inputs themselves: the tracing context has a fresh mode already, for the backend.
    mode = next((x.fake_mode for x in fakes if isinstance(x, FakeTensor)), None)
    if mode is None or not all(_is_plain(node) for node in graph_module.graph.nodes):
        return None
    allowed = mode.allow_non_fake_inputs
    # Where weights are to be constants, Dynamo leaves them in the module.
    mode.allow_non_fake_inputs = True
    try:
        with torch.no_grad(), mode:
            traced = make_fx(graph_module, pre_dispatch=True, _allow_non_fake_inputs=True)(*fakes)
    # Tracers raise whatever they like; the graph runs as Dynamo wrote it.
    except Exception as error:
        warnings.warn(
            f"members are not looked for in a graph that cannot be traced: {first_line(error)}",
            stacklevel=2,
        )
        return None
    finally:
        mode.allow_non_fake_inputs = allowed
    inputs = [n for n in traced.graph.nodes if n.op == "placeholder"]
    for old, new, fake in zip(given, inputs, fakes, strict=True):
        # AOTAutograd asks where an input came from, and finds it in these.
        new.meta.update({k: v for k, v in old.meta.items() if k not in new.meta})
        new.meta["val"] = fake
        copy_origin(old, new)
    for node in traced.graph.nodes:
        if node.op == "get_attr" and isinstance(getattr(traced, str(node.target)), torch.Tensor):
            node.meta["val"] = mode.from_tensor(getattr(traced, str(node.target)))
    return traced


def _is_plain(node: fx.Node) -> bool:
    """Whether a node is no region and no switch, such as autocast or a change of the grad mode."""
    if node.op != "call_function":
        return True
    if is_region(node.target):
        return False
    name = getattr(node.target, "__name__", "")
    return not name.startswith(("_set_grad", "_enter", "_exit", "set_grad"))
