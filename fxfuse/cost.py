"""What a network of some width costs, known before it is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.utils._pytree as pytree
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils.flop_counter import FlopCounterMode

from fxfuse.coupling import CouplingGraph
from fxfuse.errors import WidthError
from fxfuse.widen import blank


@dataclass(frozen=True)
class Cost:
    """What a network costs.

    Attributes:
        params: Elements of its parameters, tied ones once.
        flops: Floating-point operations for the example inputs, as `torch.utils.flop_counter`
            counts them (a multiplication and an addition are two).
    """

    params: int
    flops: int


def cost_of(graph: CouplingGraph, sizes: Mapping[str, int]) -> Cost:
    """What the network of these sizes costs; no memory is used and nothing is computed.

    Args:
        graph: The analysis of the members.
        sizes: Units of each fused group, by its name.

    Raises:
        RewriteError: The network cannot be written in these sizes.
        WidthError: Shapes in it depend on the values of its inputs.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def empty(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        with mode:
            return torch.empty(shape, dtype=dtype)

    module = blank(graph, sizes, empty)
    counter = FlopCounterMode(display=False)
    with torch.no_grad():
        args, kwargs = pytree.tree_map_only(
            torch.Tensor, mode.from_tensor, graph.captured.example_inputs
        )
        try:
            with counter, mode:
                module(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise WidthError(
                "the floating-point operations of this network cannot be counted beforehand",
                why=f"shapes in it depend on the values of its inputs: {error}",
                how="give a width, or max_params, in place of max_flops",
            ) from error
    params = sum(p.numel() for p in module.parameters())
    return Cost(params, counter.get_total_flops())
