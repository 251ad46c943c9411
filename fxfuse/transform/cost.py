"""What a network of some width costs, known before it is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fxfuse.analysis.coupling import CouplingGraph
from fxfuse.graph.torch_compat import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    pytree,
)
from fxfuse.planning.plan import FusionPlan
from fxfuse.planning.roles import RoleKind
from fxfuse.transform.layout import copies_of, default_layout
from fxfuse.transform.resizing import blank


def parameters_of(
    graph: CouplingGraph, sizes: Mapping[str, int], plan: FusionPlan | None = None
) -> int:
    """Return the elements of the parameters of the network of these sizes, tied ones once."""
    program, copies = graph.program, copies_of(graph, sizes)

    def elements(name: str) -> int:
        if plan is not None and plan.roles[name].kind is RoleKind.PER_MEMBER:
            members = (graph.of_member(member) for member in range(plan.n_members))
            return sum(member.program.tensor(name).numel() for member in members)
        places = [(name, dim) for dim in range(program.tensor(name).dim())]
        return prod(default_layout(graph, place, copies).size for place in places)

    names = dict.fromkeys(program.canonical[name] for name in program.names)
    return sum(elements(n) for n in names if isinstance(program.tensor(n), nn.Parameter))


def operations_of(
    graph: CouplingGraph, sizes: Mapping[str, int], plan: FusionPlan | None = None
) -> int | None:
    """Return the floating-point operations of the network of these sizes for the example inputs.

    As `torch.utils.flop_counter` counts them, a multiplication and an addition as two. No memory is
    used and nothing is computed. None where shapes depend on the values of the inputs.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def empty(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        with mode:
            return torch.empty(shape, dtype=dtype)

    module = blank(graph, sizes, empty, plan)
    counter = FlopCounterMode(display=False)
    with torch.no_grad():
        args, kwargs = pytree.tree_map_only(
            torch.Tensor, mode.from_tensor, graph.program.example_inputs
        )
        try:
            with counter, mode:
                module(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            return None
    return counter.get_total_flops()
