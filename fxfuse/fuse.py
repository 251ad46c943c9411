"""The whole way: members → capture → analyze → plan → apply → rewrite → verify."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, TypeVar

import torch
from torch import nn
from torch.export import ExportedProgram

from fxfuse.apply import fused_at_width
from fxfuse.capture import Captured, capture, check_same_network
from fxfuse.coupling import CouplingGraph, analyze
from fxfuse.errors import (
    CheckpointMismatchError,
    NothingToFuseError,
    TooFewMembersError,
    VerificationError,
)
from fxfuse.members import check_alike, check_finite, check_model, check_values
from fxfuse.methods import Options, find_method
from fxfuse.plan import FusionPlan
from fxfuse.planner import make_plan
from fxfuse.rewrite import FusedModule, emit
from fxfuse.scores import check_score
from fxfuse.verify import Check, Verification, handover, permutation_of, wrong_groups

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class FusionResult:
    """A fused network.

    Attributes:
        module: The network: `train()`/`eval()`, picklable, exportable, compilable with
            `fullgraph=True`; `state_dict()` has the names and shapes of a member's.
        plan: Which unit of which member went where.
        verification: The oracles that ran.
        graph: The analysis of the members.
    """

    module: FusedModule
    plan: FusionPlan
    verification: Verification
    graph: CouplingGraph = field(repr=False)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The fused tensors by name."""
        return self.module.state_dict()

    def load_into(self, model: Model) -> Model:
        """Loads the fused weights into the user's own class, strictly; returns that model.

        Raises:
            CheckpointMismatchError: The model has other tensors.
        """
        try:
            model.load_state_dict(self.state_dict(), strict=True)
        except RuntimeError as error:
            raise CheckpointMismatchError(
                f"the fused network does not fit {type(model).__name__}",
                why=" ".join(str(error).split()),
                how="build the model with the arguments that the members were built with",
            ) from error
        return model


def fuse(
    members: Sequence[nn.Module | ExportedProgram | Captured],
    example_inputs: Any = (),
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    method: str = "transplant",
    score: str = "l2",
    variant: str | None = None,
    host: int = 0,
    dynamic_shapes: Any = None,
    verify: bool = True,
) -> FusionResult:
    """Fuses trained networks of one architecture into one network of the same width.

    Args:
        members: Two or more networks with the same graph and the same shapes.
        example_inputs: A tensor or a tuple of inputs that the members accept, batch of at least 2.
        example_kwargs: Keyword inputs.
        method: `transplant` (Neuron Transplantation) or `average` (after alignment).
        score: Importance of a unit for `transplant`: `l1` or `l2`.
        variant: For `transplant`: None, `iterative` or `hierarchical`.
        host: The member that keeps every piece that is frozen inside the network.
        dynamic_shapes: Passed to `torch.export.export` unchanged.
        verify: Whether to run the oracles before handing the network over.

    Returns:
        The fused network, its plan and what was verified.

    Raises:
        TooFewMembersError: Fewer than two members.
        ExampleInputError: A member rejects the example inputs.
        UnsupportedTensorError: A member holds sparse or quantised tensors.
        NoWeightsError: The members are on the meta device.
        CaptureError: A member cannot be captured.
        MemberMismatchError: The members are not the same network.
        NonFiniteWeightsError: A member holds NaN or infinity.
        UnknownMethodError: No such method or variant.
        UnknownScoreError: No such score.
        NothingToFuseError: No parameter has a free dimension.
        VerificationError: An oracle failed.
    """
    if len(members) < 2:
        raise TooFewMembersError(
            f"{len(members)} member{'s' if len(members) != 1 else ''} given",
            why="fusion needs at least two networks",
            how="pass two or more trained networks of one architecture",
        )
    find_method(method)
    check_score(score)
    for member in members:
        if not isinstance(member, Captured):
            check_model(member)
    check_alike(members)
    captured = [
        m
        if isinstance(m, Captured)
        else capture(m, example_inputs, example_kwargs, dynamic_shapes=dynamic_shapes)
        for m in members
    ]
    check_same_network(captured)
    states = [c.state() for c in captured]
    for number, state in enumerate(states):
        check_values(state)
        check_finite(number, state)
    graph = analyze(captured[0])
    checks = []
    if verify:
        graph, check = _only_what_moves(graph)
        checks.append(check)
    _check_free(graph)
    plan = make_plan(graph, states, method, Options(score, variant), host=host)
    fused = fused_at_width(graph, plan, states)
    module = emit(captured[0], fused)
    if verify:
        checks += handover(captured[0], module)
    verification = Verification(tuple(checks))
    _check_verified(verification)
    return FusionResult(module, plan, verification, graph)


def _check_free(graph: CouplingGraph) -> None:
    if graph.groups:
        return
    if not list(graph.captured.module.parameters()):
        raise NothingToFuseError(
            "nothing in this network can be fused",
            why="it has no parameters",
            how="pass networks with trained weights",
        )
    reasons = [r for r in graph.frozen.values() if r.node]
    reasons.sort(key=lambda reason: reason.interface)
    raise NothingToFuseError(
        "nothing in this network can be fused",
        where=f"{reasons[0].node}  {reasons[0].source}".rstrip() if reasons else "",
        why="every dimension of every parameter is frozen"
        + (f"; the first: {reasons[0].why}" if reasons else ""),
        how="see fxfuse.analyze(...).frozen for all reasons; an operator without a rule can get "
        "one in fxfuse/rules/",
    )


def _only_what_moves(graph: CouplingGraph) -> tuple[CouplingGraph, Check]:
    """Freezes the groups that the permutation oracle cannot move, with a loud warning."""
    check = permutation_of(graph)
    wrong = () if check.passed or not isfinite(check.error) else wrong_groups(graph)
    if not wrong:
        return graph, check
    names = [g.name for g in wrong]
    warnings.warn(
        f"coupling groups {names} changed the network when permuted, so they are frozen and one "
        "member's weights are kept there. A rule of fxfuse is wrong: please report the network.",
        stacklevel=3,
    )
    graph = graph.freezing(names, "the permutation oracle could not move this group")
    return graph, permutation_of(graph)


def _check_verified(verification: Verification) -> None:
    failed = [check for check in verification.checks if not check.passed]
    if failed:
        raise VerificationError(
            "the fused network failed its verification and is not handed over",
            where=", ".join(check.name for check in failed),
            why="; ".join(
                f"{c.name}: error {c.error:.2e}, tolerance {c.tolerance:.0e} {c.detail}"
                for c in failed
            ),
            how="check the members' weights; verify=False returns the network all the same",
        )
