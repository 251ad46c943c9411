"""Structured pruning: the transplant of one network into a smaller one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.export import ExportedProgram

from fxfuse.analysis.constraints import Constraints
from fxfuse.api.checks import check_kind
from fxfuse.api.load_members import single
from fxfuse.api.result import FusionResult
from fxfuse.api.stages import Planner, Refinement, analyze_ensemble, build_network
from fxfuse.errors import OptionError
from fxfuse.graph.capture import Program, capture
from fxfuse.planning.methods import Method, find_method
from fxfuse.planning.plan import FusionPlan
from fxfuse.planning.size import Size
from fxfuse.refine import Match, Refit, Task

if TYPE_CHECKING:
    from rich.progress import Progress


def prune(
    network: nn.Module | ExportedProgram | Program,
    example: Any = (),
    *,
    size: float | Mapping[str, float] | Size | None = None,
    method: str | Method = "transplant",
    calibration: Any = None,
    task: Task | None = None,
    refine: Sequence[Refit | Match] | None = None,
    constraints: Constraints | None = None,
    plan: FusionPlan | None = None,
    verify: bool = True,
    progress: bool | Progress = False,
) -> FusionResult:
    """Prune the least important units of one network: whole channels, neurons and heads.

    The network may be a trained one of any class, or what `fuse` or `prune` returned, trained on:
    a gradual schedule is a loop of pruning and training. Units that other layers depend on are
    removed with everything that writes or reads them, so the result is a smaller dense network.

    Args:
        network: What `fxfuse.capture` takes; it stays as it is.
        example: Example inputs, as in `fuse`.
        size: Size of the result in units of this network, in (0, 1], or a `Size`. A group that
            cannot be written in another size keeps its own: its map in the plan says why.
        method: How units are chosen: `Transplant(score=...)` names their importance.
        calibration: Calibration inputs, as in `fuse`.
        task: What the output means, as in `fuse`.
        refine: What follows the pruning, as in `fuse`; the network itself is the ensemble.
        constraints: Parameters that stay or are left alone; free outputs.
        plan: The plan that the network was made with: its constraints hold here, too, and the new
            plan names it as its origin.
        verify: Whether to run the oracles before the network is returned.
        progress: Progress of the matching, as in `fuse`.

    Returns:
        The pruned network, its plan (of one member, this network) and what was verified.

    Raises:
        OptionError: There is no size, or an option names nothing in the network.
        InputError: The network rejects the inputs, or calibration inputs are missing or unfit.
        CaptureError: The network cannot be captured.
        CaptureError: torch.export rejects the network, so it cannot be written in another size.
        PlanError: No parameter has a free dimension.
        RewriteError: The network cannot be written in this size.
        VerificationError: An oracle failed.
    """
    wanted = Size.of(size)
    if not wanted.is_given:
        raise OptionError(
            "pruning needs a size",
            why="neither a width nor a budget is given",
            how="pass size=0.5 to keep half of every layer, for instance",
        )
    check_kind("constraints", constraints, Constraints)
    chosen, constraints = find_method(method), constraints or Constraints()
    if plan is not None:
        constraints = plan.constraints.and_also(constraints)
    refinement = Refinement.of(
        refine, calibration, task, progress, chosen, matchable=not constraints.output_dims
    )
    program = network if isinstance(network, Program) else capture(network, example)
    program.require_exported()
    ensemble = single(program)
    graph, checks = analyze_ensemble(ensemble, constraints, verify=verify)
    batches = refinement.batches(program)
    origin = "" if plan is None else plan.digest
    planner = Planner(graph, ensemble, chosen, wanted, fitted=bool(refinement), origin=origin)
    return build_network(planner, refinement, checks, batches=batches, verify=verify)
