"""The parity oracle: the reference's way to the same network, by concatenating and pruning."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from fxfuse.apply import fused_tensors
from fxfuse.capture import capture
from fxfuse.coupling import CouplingGraph, Place, analyze
from fxfuse.errors import MissingDependencyError
from fxfuse.labels import Kind
from fxfuse.layer_sizes import sizes_of_layer
from fxfuse.layout import Layout
from fxfuse.methods import Options
from fxfuse.planner import make_plan
from fxfuse.scores import degree_of
from fxfuse.verify.check import Check, as_double, inputs_of, relative_error

#: torch-pruning scores in float32; weights are only copied, so what is kept must be equal.
_TOLERANCE = 1e-6


def parity(members: Sequence[nn.Module], example_inputs: Any, *, score: str = "l2") -> Check:
    """Parity oracle: our transplant equals concatenating the members and pruning the result.

    The reference concatenates the members into a wide copy of the first one, scales the output
    layer by 1/N and prunes it with `MagnitudeImportance`, locally, heads ignored, with ratio
    1 - 1/N (Öz et al., arXiv:2502.06849). Only for networks made of convolutions, linear layers
    and BatchNorm, which is what the reference can concatenate.

    Args:
        members: Two or more networks; they stay as they are.
        example_inputs: A tensor or a tuple of inputs.
        score: `l1` or `l2`.

    Returns:
        The largest difference of a weight, relative to the tensor's largest weight.

    Raises:
        MissingDependencyError: torch-pruning is not installed.
    """
    try:
        import torch_pruning
    except ImportError as error:
        raise MissingDependencyError(
            "the parity oracle needs torch-pruning", how='pip install "fxfuse[test]"'
        ) from error
    n = len(members)
    captured = [capture(member, example_inputs) for member in members]
    graph = analyze(captured[0])
    states = [c.state() for c in captured]
    plan = make_plan(graph, states, "transplant", Options(score))
    ours = fused_tensors(graph, plan, states)

    # In float64, so that rounding makes no ties that the weights do not have.
    wide = _concatenated(members[0], graph, [as_double(state) for state in states]).double()
    inputs, _ = inputs_of(captured[0])
    pruner = torch_pruning.pruner.BasePruner(
        wide,
        inputs,
        importance=torch_pruning.importance.MagnitudeImportance(p=degree_of(score)),
        pruning_ratio=1 - 1 / n,
        global_pruning=False,
        ignored_layers=_heads(wide, graph),
    )
    pruner.step()
    theirs = wide.state_dict()
    shapes = [name for name in ours if ours[name].shape != theirs[name].shape]
    if shapes:
        return Check("parity", float("inf"), _TOLERANCE, False, f"shapes differ: {shapes[:3]}")
    floats = [name for name in ours if ours[name].is_floating_point()]
    worst = max(relative_error([ours[name]], [theirs[name].detach()]) for name in floats)
    return Check(
        "parity", worst, _TOLERANCE, worst <= _TOLERANCE, f"{len(floats)} tensors, N = {n}"
    )


def _concatenated(
    member: nn.Module, graph: CouplingGraph, states: Sequence[Mapping[str, torch.Tensor]]
) -> nn.Module:
    """A wide copy of a member, the members' channels one member after the other."""
    n = len(states)
    plan = make_plan(graph, states, "wide", Options())
    layouts: dict[Place, Layout] = {}
    for name, dim in graph.group_of:
        size = graph.captured.tensor(name).shape[dim]
        layouts[(name, dim)] = Layout(np.tile(np.arange(size), n), np.repeat(np.arange(n), size))
    state = fused_tensors(graph, plan, states, layouts)
    wide = copy.deepcopy(member).eval()
    for name, tensor in state.items():
        path, _, leaf = name.rpartition(".")
        owner = wide.get_submodule(path)
        if isinstance(getattr(owner, leaf), nn.Parameter):
            setattr(owner, leaf, nn.Parameter(tensor))
        else:
            setattr(owner, leaf, tensor)
    for module in wide.modules():
        for attribute, size in (sizes_of_layer(module) or {}).items():
            setattr(module, attribute, size)
    return wide


def _heads(wide: nn.Module, graph: CouplingGraph) -> list[nn.Module]:
    outputs = {name for (name, _), r in graph.frozen.items() if r.kind is Kind.OUTPUT}
    return [wide.get_submodule(name.rpartition(".")[0]) for name in sorted(outputs)]
