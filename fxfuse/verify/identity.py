"""The identity oracle, and what must hold of any fused module."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from fxfuse.analysis.coupling import analyze
from fxfuse.graph.capture import Program
from fxfuse.graph.run import answers
from fxfuse.graph.tensors import tensors_in
from fxfuse.graph.torch_compat import hint
from fxfuse.planning.context import Context
from fxfuse.planning.methods import WeightMatching
from fxfuse.planning.planner import make_plan
from fxfuse.transform.apply import fused_tensors, permuted, random_permutations
from fxfuse.transform.layout import Layout
from fxfuse.verify.check import (
    Check,
    as_double,
    precision_in_words,
    relative_error,
    run,
    tolerance_of,
)


def identity(
    model: nn.Module | Program,
    example: Any = (),
    *,
    seed: int = 0,
) -> Check:
    """Identity oracle: a network fused with a permuted copy of itself is the network again.

    By weight matching, which has to find the permutation.

    Args:
        model: The network, or a captured one.
        example: A tensor, a tuple, a mapping of keyword inputs, or an `Example`.
        seed: Seed of the permutations.

    Returns:
        The largest difference of an output, in float64.
    """
    graph = analyze(model, example)
    own = as_double(graph.program.state())
    moves = random_permutations(graph.groups, np.random.default_rng(seed))
    states = [own, permuted(own, graph, moves)]
    plan = make_plan(graph, states, WeightMatching(), Context())
    fused = fused_tensors(graph, plan, states)
    expected = run(graph.program, own)
    error = relative_error(run(graph.program, fused), expected)
    tolerance = tolerance_of(graph.program, own, expected)
    detail = precision_in_words(expected) + "averaging after weight matching"
    return Check("identity", error, tolerance, error <= tolerance, detail)


def handover(
    member: Program,
    network: Callable[..., Any],
    layouts: Sequence[Mapping[int, Layout]] | None = None,
) -> tuple[Check, ...]:
    """Return what must hold of any fused network: the member's output shapes, finite outputs.

    Where the network was traced, its output sizes may depend on the data, and so on the weights:
    then only the outputs' values are checked.

    Args:
        member: A captured member.
        network: The fused network, called as the member is.
        layouts: For each output, the layouts of the dimensions in which units are handed out, and
            in another number than the member's; None where there are none.
    """
    args, kwargs = member.example_inputs
    if isinstance(network, nn.Module):
        outputs = tensors_in(answers(network, {}, args, kwargs))
    else:
        with torch.no_grad():
            outputs = tensors_in(network(*args, **kwargs))
    broken = sum(int((~torch.isfinite(o)).sum()) for o in outputs)
    finite = Check(
        "finite outputs", float(broken), 0.0, broken == 0, f"{broken} values are not finite"
    )
    if not member.is_exported:
        return (finite,)
    same = _has_shapes(outputs, _known_shapes(member), layouts)
    if not same:
        # Sizes that depend on the data are only known once it has run.
        expected = tensors_in(answers(member.module, {}, args, kwargs))
        same = _has_shapes(outputs, [list(e.shape) for e in expected], layouts)
    shapes = ", ".join(str(tuple(o.shape)) for o in outputs)
    return Check("output shape", 0.0 if same else 1.0, 0.0, same, shapes), finite


def _known_shapes(member: Program) -> list[list[int]]:
    """Return the shapes of a member's outputs for its example, as its capture found them."""
    values = (node.meta.get("val") for node in member.outputs() if isinstance(node, fx.Node))
    return [list(map(hint, value.shape)) for value in values if isinstance(value, torch.Tensor)]


def _has_shapes(
    outputs: Sequence[torch.Tensor],
    wanted: Sequence[list[int]],
    layouts: Sequence[Mapping[int, Layout]] | None,
) -> bool:
    """Tell whether outputs have these shapes, but for dimensions in which units are handed out."""
    if len(outputs) != len(wanted):
        return False
    for sizes, grown in zip(wanted, layouts or (), strict=layouts is not None):
        for dim, layout in grown.items():
            sizes[dim] = layout.size
    return [list(output.shape) for output in outputs] == wanted
