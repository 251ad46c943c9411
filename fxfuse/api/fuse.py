"""All steps: members → capture → analyze → plan → build → refine → verify."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxfuse.analysis.constraints import Constraints
from fxfuse.analysis.label_spaces import Heads
from fxfuse.api.checks import check_kind
from fxfuse.api.load_members import load_members
from fxfuse.api.result import FusionResult
from fxfuse.api.stages import (
    Planner,
    Refinement,
    analyze_ensemble,
    build_network,
    in_architecture,
)
from fxfuse.graph.example import Example
from fxfuse.members.members import Members
from fxfuse.members.streamed import Network
from fxfuse.planning.methods import Method, find_method
from fxfuse.planning.size import Size
from fxfuse.refine import Match, Refit, Task

if TYPE_CHECKING:
    from rich.progress import Progress


def fuse(
    members: Sequence[Network | str | Path] | Members,
    example: Any = (),
    *,
    method: str | Method = "transplant",
    size: float | Mapping[str, float] | Size | None = None,
    calibration: Any = None,
    task: Task | None = None,
    refine: Sequence[Refit | Match] | None = None,
    constraints: Constraints | None = None,
    heads: Heads | None = None,
    verify: bool = True,
    progress: bool | Progress = False,
) -> FusionResult:
    """Fuse trained networks of one architecture into one network of the same or another size.

    Without calibration inputs the result is a raw transplant, most likely at chance level. With
    them every step follows: units are selected by `obs`, every layer is refitted, the
    refitted network or the best member is the start, and it is matched to the ensemble.

    Args:
        members: Two or more networks with the same graph, apart from `heads`; or `Members`, for
            checkpoints that stay on disk and for members on several processes. With calibration
            inputs members may have different architectures: the result has the base member's, whose
            members are fused, and is fitted and matched to all.
        example: A tensor, a tuple of inputs, a mapping of keyword inputs, or an `Example`; batch of
            at least 2. Members that torch.export rejects are traced on it, so it should reach every
            part.
        method: How units of the members are chosen and combined: a name with default options, or an
            object such as `Transplant(score="l1")`.
        size: Size of the result in units of a member, in (0, N], or a `Size`. None: a member's.
        calibration: 100 to 1,000 inputs from the members' own domain, or a `Calibration`.
        task: What the output means, for refit and matching; None lets its shape decide.
        refine: What follows the fusion. None: `[Refit(), Match()]` with calibration inputs (only
            the refit with several heads or free outputs), nothing without.
        constraints: Parameters that stay, are shared or are left alone; free outputs; the base
            member.
        heads: Modules in which each member keeps its own head, and what the heads return together.
            Head i reads the units that come from member i with that member's weights.
        verify: Whether to run the oracles before the network is returned.
        progress: True shows a bar of the matching on stderr; a `rich.progress.Progress` gets a task
            of its own.

    Returns:
        The fused network, its plan and what was verified.

    Raises:
        MemberError: Members are too few, differ, or hold no finite dense weights.
        InputError: A member rejects the inputs, or calibration inputs are missing or unfit.
        CaptureError: A member cannot be captured.
        OptionError: An option names nothing in the network, or contradicts another one.
        PlanError: No parameter has a free dimension.
        RewriteError: The network cannot be written in this size.
        VerificationError: An oracle failed.
    """
    check_kind("heads", heads, Heads)
    check_kind("constraints", constraints, Constraints)
    heads, constraints = heads or Heads(()), constraints or Constraints()
    matchable = not heads and not constraints.output_dims
    chosen, wanted = find_method(method), Size.of(size)
    refinement = Refinement.of(refine, calibration, task, progress, chosen, matchable=matchable)
    ensemble = load_members(
        Members.of(members),
        Example.of(example),
        heads,
        runs_members=calibration is not None,
        base_member=constraints.base_member if matchable else None,
    )
    if ensemble.others:
        constraints = in_architecture(constraints, ensemble, refinement)
    graph, checks = analyze_ensemble(ensemble, constraints, verify=verify)
    batches = refinement.batches(ensemble.network)
    planner = Planner(graph, ensemble, chosen, wanted, fitted=bool(refinement))
    return build_network(planner, refinement, checks, batches=batches, verify=verify)
