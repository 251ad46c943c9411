"""The parity oracle: the reference's way to the same network, by concatenating and pruning."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from fxfuse.analysis.coupling import CouplingGraph, Place, analyze
from fxfuse.analysis.labels import Kind
from fxfuse.errors import MissingDependencyError
from fxfuse.graph.capture import capture
from fxfuse.graph.layer_sizes import sizes_of_layer
from fxfuse.planning.context import Context
from fxfuse.planning.methods import Concatenate, Transplant
from fxfuse.planning.planner import make_plan
from fxfuse.planning.scores import degree_of
from fxfuse.transform.apply import fused_tensors
from fxfuse.transform.layout import Layout
from fxfuse.verify.check import Check, as_double, inputs_of, relative_error

#: torch-pruning scores in float32; weights are only copied, so what is kept must be equal.
_TOLERANCE = 1e-6


def parity(members: Sequence[nn.Module], example: Any, *, score: str = "l2") -> Check:
    """Parity oracle: our transplant equals concatenating the members and pruning the result.

    The reference concatenates the members into a wide copy of the first one, scales the output
    layer by 1/N and prunes it with `MagnitudeImportance`, locally, heads ignored, with ratio
    1 - 1/N (Öz et al., arXiv:2502.06849). Only for networks made of convolutions, linear layers
    and BatchNorm, which is what the reference can concatenate.

    Args:
        members: Two or more networks; they stay as they are.
        example: A tensor, a tuple, a mapping of keyword inputs, or an `Example`.
        score: `l1` or `l2`.

    Returns:
        The largest difference of a weight, relative to the tensor's largest weight.

    Raises:
        MissingDependencyError: torch-pruning is not installed.
    """
    n = len(members)
    program = [capture(member, example) for member in members]
    graph = analyze(program[0])
    states = [c.state() for c in program]
    plan = make_plan(graph, states, Transplant(score), Context())
    ours = fused_tensors(graph, plan, states)

    # In float64, so that rounding makes no ties that the weights do not have.
    inputs, _ = inputs_of(program[0])
    doubled = [as_double(state) for state in states]
    wide = concatenated_and_pruned(members[0], graph, doubled, inputs, degree_of(score))
    theirs = wide.state_dict()
    shapes = [name for name in ours if ours[name].shape != theirs[name].shape]
    if shapes:
        return Check("parity", float("inf"), _TOLERANCE, False, f"shapes differ: {shapes[:3]}")
    floats = [name for name in ours if ours[name].is_floating_point()]
    worst = max(relative_error([ours[name]], [theirs[name].detach()]) for name in floats)
    return Check(
        "parity", worst, _TOLERANCE, worst <= _TOLERANCE, f"{len(floats)} tensors, N = {n}"
    )


def concatenated_and_pruned(
    member: nn.Module,
    graph: CouplingGraph,
    states: Sequence[Mapping[str, torch.Tensor]],
    inputs: tuple[Any, ...],
    degree: int,
) -> nn.Module:
    """Make the reference: a wide copy of member 0 with all members' channels, pruned to its size.

    Channels are ranked by their norm of `degree`; tensors and inputs are of one floating-point
    dtype.
    """
    try:
        import torch_pruning
    except ImportError as error:
        raise MissingDependencyError(
            "the parity oracle needs torch-pruning", how='pip install "fxfuse[test]"'
        ) from error
    dtype = next(t.dtype for t in states[0].values() if t.is_floating_point())
    wide = _concatenated(member, graph, states).to(dtype)
    torch_pruning.pruner.BasePruner(
        wide,
        inputs,
        importance=torch_pruning.importance.MagnitudeImportance(p=degree),
        pruning_ratio=1 - 1 / len(states),
        global_pruning=False,
        ignored_layers=_heads(wide, graph),
    ).step()
    return wide


def _concatenated(
    member: nn.Module, graph: CouplingGraph, states: Sequence[Mapping[str, torch.Tensor]]
) -> nn.Module:
    """Return a wide copy of a member, the members' channels one member after the other."""
    n = len(states)
    plan = make_plan(graph, states, Concatenate(), Context())
    layouts: dict[Place, Layout] = {}
    for name, dim in graph.group_of:
        size = graph.program.tensor(name).shape[dim]
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
