"""The wide oracle: the concatenation of the members is their ensemble."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fxfuse.analysis.constraints import Constraints
from fxfuse.analysis.coupling import CouplingGraph, couple
from fxfuse.analysis.multi_width import multi_width
from fxfuse.errors import VerificationError
from fxfuse.graph.capture import Program
from fxfuse.graph.run import answers
from fxfuse.graph.same_network import check_same_network
from fxfuse.graph.tensors import is_constant, tensors_in
from fxfuse.members.ranks import mapped, of_each
from fxfuse.planning.plan import FusionPlan
from fxfuse.planning.size import MixingMode
from fxfuse.transform.resizing import emit_resized, output_layouts
from fxfuse.transform.sizes import concatenation_plan
from fxfuse.verify.check import (
    Check,
    as_program,
    in_best_precision,
    in_double,
    inputs_of,
    precision_in_words,
    relative_error,
    run,
    tolerance_of,
)
from fxfuse.verify.in_double import doubled
from fxfuse.verify.outputs import parts


def concatenation_equals_ensemble(
    members: Sequence[nn.Module | Program],
    example: Any = (),
    *,
    constraints: Constraints | None = None,
    mixing: MixingMode = "joint",
) -> Check:
    """Wide oracle: without a mixing operator, the concatenation equals the mean of the members.

    Where units are handed out (`output_dims`), they stand side by side, and each member's must be
    the member's own.

    Runs in float64. Where an operator mixes members there is nothing to hold: the tolerance is
    infinite and the detail names the operators. With `mixing="per_member"` nothing mixes them.

    Args:
        members: Two or more networks, or captured ones.
        example: A tensor, a tuple, a mapping of keyword inputs, or an `Example`.
        constraints: The options of `fxfuse.analyze`.
        mixing: `joint` or `per_member`, as in `FusionPlan.mixing`.

    Raises:
        MemberError: The members are not the same network.
        CaptureError: torch.export rejected a member, so there is no concatenation to run.
        VerificationError: All outputs are whole numbers in which members differ.
    """
    program = [as_program(m, example) for m in members]
    for member in program:
        member.require_exported()
    check_same_network(program, any_width=True)
    constraints = constraints or Constraints()
    graph = couple(program[0], constraints)
    graph = multi_width(graph, program, lambda member: couple(member, constraints))
    states = [c.state() for c in program]
    plan = concatenation_plan(graph, states, mixing)
    return equals_ensemble(graph, states, plan, hands_out=bool(constraints.output_dims))


def equals_ensemble(
    graph: CouplingGraph,
    states: Sequence[Mapping[str, torch.Tensor]],
    plan: FusionPlan,
    *,
    hands_out: bool,
) -> Check:
    """Return the wide oracle for members that are analyzed already."""
    # Before the concatenation is there: a member and its copy need not be in memory beside it.
    members = of_each(states, lambda i, state: run(graph.of_member(i).program, state))
    outputs = [answer for _, answer in members]
    wide = _answers(graph, plan, states)
    layouts = output_layouts(graph, plan) if hands_out else [{} for _ in wide]
    pairs = [parts(*each) for each in zip(wide, zip(*outputs, strict=True), layouts, strict=True)]
    error = max((_error(*pair) for pair in pairs), default=0.0)
    uncompared = [str(number) for number, (found, _) in enumerate(pairs) if not found]
    if pairs and len(uncompared) == len(pairs):
        raise VerificationError(
            "the members' outputs cannot be compared with the concatenation's",
            where=f"outputs {', '.join(uncompared)}",
            why="members answer other whole numbers, which have no mean",
            how="let the network return what the numbers are computed from (logits, say), too, or "
            "use verify=False",
        )
    notes = plan.inexact()
    tolerance = float("inf") if notes else tolerance_of(graph.program, states[0], outputs[0])
    detail = "mixing: " + "; ".join(notes) if notes else "no operator mixes members"
    if uncompared:
        detail += f"; not compared: outputs {', '.join(uncompared)}, whole numbers without a mean"
    detail = precision_in_words(wide) + detail
    return Check("wide equals ensemble", error, tolerance, error <= tolerance, detail)


def equals_heads(
    graph: CouplingGraph,
    states: Sequence[Mapping[str, torch.Tensor]],
    plan: FusionPlan,
    members: Sequence[Program],
    dim: int,
) -> Check:
    """Return the wide oracle of a partial fusion: every head answers as its own member.

    Args:
        graph: The analysis of the members as one network (`fxfuse.analysis.heads.join`).
        states: For each member, its tensors by name.
        plan: A plan that keeps every unit of every member.
        members: The members themselves.
        dim: The output's dimension of classes, where heads are returned as one tensor.
    """
    found = _answers(graph, plan, states)
    own = [run(m, m.state()) for m in members]
    error = relative_error(found, plan.heads.combined(own, dim))
    notes = plan.inexact()
    tolerance = tolerance_of(members[0], members[0].state(), own[0])
    tolerance = float("inf") if notes else tolerance
    detail = "mixing: " + "; ".join(notes) if notes else "each head reads its own member's units"
    detail = precision_in_words(found) + detail
    return Check("heads equal members", error, tolerance, error <= tolerance, detail)


def _error(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Return how far an output is off; whole numbers are right or wrong."""
    if expected and is_constant(expected[0]):
        return 0.0 if all(map(torch.equal, found, expected)) else float("inf")
    return relative_error(found, expected)


def _answers(
    graph: CouplingGraph, plan: FusionPlan, states: Sequence[Mapping[str, torch.Tensor]]
) -> list[torch.Tensor]:
    """Return what the resized network answers to the example, in float64 where it can."""

    def outputs(*, double: bool) -> list[torch.Tensor]:
        # Each tensor is converted when it is read: beside the wide network there is one at a time.
        own = mapped(states, doubled) if double else states
        module = emit_resized(graph, plan, own)
        args, kwargs = inputs_of(graph.program, double=double)
        return tensors_in(answers(in_double(module) if double else module, {}, args, kwargs))

    return in_best_precision(lambda: outputs(double=True), lambda: outputs(double=False))
