"""Structured pruning: the transplant of one network into a smaller one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from fxfuse.activations.calibration import Calibration
from fxfuse.analysis.constraints import Constraints, OutputDims, Patterns
from fxfuse.analysis.coupling import couple
from fxfuse.api.result import FusionResult
from fxfuse.api.soundness import examined, verified
from fxfuse.errors import OptionError
from fxfuse.graph.capture import Program, capture
from fxfuse.graph.module_checks import check_finite, check_values
from fxfuse.members.fingerprint import fingerprint
from fxfuse.planning.allocation import Budget, check_budget
from fxfuse.planning.options import Options
from fxfuse.planning.plan import FusionPlan
from fxfuse.planning.scores import check_score
from fxfuse.planning.widths import Width
from fxfuse.transform.resize import Target
from fxfuse.transform.resizing import emit_resized, output_layouts
from fxfuse.transform.sized_plan import make_sized_plan
from fxfuse.verify import handover


def prune(
    module: nn.Module | ExportedProgram | Program,
    example_inputs: Any = (),
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    width: Width | None = None,
    plan: FusionPlan | None = None,
    score: str = "l2",
    max_params: int | None = None,
    max_flops: int | None = None,
    round_to: int = 1,
    budget: Budget = "local",
    calibration: Any = None,
    calibration_limit: int = 1000,
    calibration_copies: int = 0,
    freeze: Patterns = (),
    ignore: Patterns = (),
    output_dims: OutputDims | None = None,
    dynamic_shapes: Any = None,
    verify: bool = True,
) -> FusionResult:
    """Prunes the least important units of one network: whole channels, neurons and heads.

    The network may be a trained one of any class, or what `fuse` or `prune` returned, trained on:
    a gradual schedule is a loop of pruning and training. Units that stand in other layers' way are
    removed with everything that writes or reads them, so what comes out is a smaller dense network.

    Args:
        module: What `fxfuse.capture` takes; it stays as it is.
        example_inputs: A tensor or a tuple of inputs that it accepts, batch of at least 2.
        example_kwargs: Keyword inputs.
        width: Size of the pruned network in units of this network, in (0, 1], or widths by pattern,
            as in `fuse`. A group that cannot be written in another size keeps its own: the plan's
            `kept_sizes` says why.
        plan: The plan that the network was made with. What it was told to freeze, share and ignore
            and which outputs it set free holds here, too, and the new plan names it as its origin.
        score: Importance of a unit, as in `fuse`; `activation` and `obs` need calibration inputs,
            `taylor` and `fisher` labels as well.
        max_params: In place of `width`: the most parameter elements; the widest network is made.
        max_flops: The same for floating-point operations on the example inputs.
        round_to: Channels are rounded to multiples of this, 8 for most hardware.
        budget: `local` or `global`, as in `fuse`.
        calibration: Inputs from the network's own domain, as in `fuse`.
        calibration_limit: So many of them are taken at most, as in `fuse`.
        calibration_copies: So many augmented copies of each are looked at as well, as in `fuse`.
        freeze: `state_dict()` names of parameters that stay exactly as they are, as in `analyze`.
        ignore: Dotted paths of submodules of which nothing is pruned.
        output_dims: The interface dimensions of outputs, as in `analyze`.
        dynamic_shapes: Passed to `torch.export.export` unchanged.
        verify: Whether to run the oracles before handing the network over.

    Returns:
        The pruned network, its plan (of one member, this network) and what was verified.

    Raises:
        OptionError: Neither a width nor a budget is given, or an option names nothing in the
            network or contradicts another one.
        OptionError: A width is no number in (0, 1], leaves a group without a unit, or no width
        meets
            the budget.
        InputError: The network rejects the example inputs.
        MemberError: The network holds sparse or quantised tensors.
        MemberError: The network is on the meta device.
        CaptureError: The network cannot be captured.
        CaptureError: torch.export rejects the network, so it cannot be written in another size.
        MemberError: The network holds NaN or infinity.
        OptionError: No such score.
        InputError: The score needs calibration inputs, or labels, and there are none.
        PlanError: No parameter has a free dimension.
        VerificationError: An oracle failed.
        RewriteError: The network cannot be written in another size.
    """
    target = Target(width, max_params, max_flops, round_to, "joint", budget)
    if width is None and not target.is_budget:
        raise OptionError(
            "pruning needs a width or a budget",
            why="neither width, max_params nor max_flops is given",
            how="pass width=0.5 to keep half of every layer, for instance",
        )
    check_score(score)
    check_budget(budget, width, given=True, score=score)
    program = module
    if not isinstance(program, Program):
        program = capture(program, example_inputs, example_kwargs, dynamic_shapes=dynamic_shapes)
    program.require_exported()
    state = program.state()
    check_values(state)
    check_finite(0, state)
    constraints = Constraints(freeze, (), ignore, output_dims)
    if plan is not None:
        constraints = plan.constraints.and_also(constraints)
    graph = couple(program, constraints)
    graph, checks = examined(graph, verify=verify)
    inputs = (
        None
        if calibration is None
        else Calibration.of(
            program, calibration, limit=calibration_limit, copies=calibration_copies
        )
    )
    options = Options(score, calibration=inputs)
    made = make_sized_plan(graph, [state], "transplant", options, target, fitted=False)
    made = made.made_for([fingerprint(state)], "" if plan is None else plan.digest)
    pruned = emit_resized(graph, made, [state])
    if verify:
        grown = output_layouts(graph, made) if constraints.output_dims else None
        checks += handover(program, pruned, grown)
    return FusionResult(made, verified(checks), graph, pruned.state_dict(), pruned)
