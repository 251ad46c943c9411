"""The wide oracle: the concatenation of the members is their ensemble."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fxfuse.capture import Captured
from fxfuse.controls import Controls
from fxfuse.coupling import couple
from fxfuse.methods import Options
from fxfuse.planner import make_plan
from fxfuse.verify.check import (
    EXACT,
    Check,
    as_captured,
    as_double,
    in_double,
    inputs_of,
    relative_error,
    run,
    tensors_of,
)
from fxfuse.verify.outputs import parts
from fxfuse.widen import output_layouts, widen


def wide_equals_ensemble(
    members: Sequence[nn.Module | Captured],
    example_inputs: Any = (),
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    controls: Controls | None = None,
) -> Check:
    """Wide oracle: without a mixing operator, the concatenation equals the mean of the members.

    Where units are handed out (`output_dims`), they stand side by side, and each member's must be
    the member's own.

    Runs in float64. With a mixing operator there is nothing to hold: the tolerance is infinite and
    the detail names the operators.

    Args:
        members: Two or more networks, or captured ones.
        example_inputs: A tensor or a tuple of inputs.
        example_kwargs: Keyword inputs.
        controls: The options of `fxfuse.analyze`.

    Raises:
        NotEmittedError: torch.export refused a member, so that there is no concatenation to run.
    """
    captured = [as_captured(m, example_inputs, example_kwargs) for m in members]
    for member in captured:
        member.require_program()
    graph = couple(captured[0], controls or Controls())
    states = [as_double(c.state()) for c in captured]
    plan = make_plan(graph, states, "wide", Options())
    module = in_double(widen(graph, plan, states))
    outputs = [run(c, s) for c, s in zip(captured, states, strict=True)]
    args, kwargs = inputs_of(captured[0])
    with torch.no_grad():
        wide = tensors_of(module(*args, **kwargs))
    # Units are handed out only where an output dimension is no interface.
    handed_out = controls is not None and controls.output_dims
    layouts = output_layouts(graph, plan) if handed_out else [{} for _ in wide]
    pairs = [parts(*each) for each in zip(wide, zip(*outputs, strict=True), layouts, strict=True)]
    error = max((relative_error(*pair) for pair in pairs), default=0.0)
    notes = plan.inexact()
    tolerance = float("inf") if notes else EXACT
    detail = "mixing: " + "; ".join(notes) if notes else "no operator mixes members"
    return Check("wide equals ensemble", error, tolerance, error <= tolerance, detail)
