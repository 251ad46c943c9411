"""The whole way: members → capture → analyze → plan → apply → rewrite → verify."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from rich.progress import Progress
from torch import nn
from torch.export import ExportedProgram

from fxfuse.activations.calibration import Calibration
from fxfuse.analysis.constraints import Constraints, OutputDims, Patterns
from fxfuse.analysis.coupling import CouplingGraph, couple, hands_out
from fxfuse.analysis.label_spaces import HeadOutput, heads_of
from fxfuse.analysis.multi_width import check_base_member, multi_width
from fxfuse.api.gathered import gathered
from fxfuse.api.given_plan import check_alone, check_count, check_plan
from fxfuse.api.result import FusionResult
from fxfuse.api.soundness import examined, verified
from fxfuse.errors import InputError, OptionError
from fxfuse.graph.capture import Program
from fxfuse.graph.eager import answers
from fxfuse.graph.module_checks import check_enough
from fxfuse.members.fingerprint import fingerprints
from fxfuse.members.ranks import Ranks
from fxfuse.planning.allocation import Budget, check_budget
from fxfuse.planning.methods import find_method
from fxfuse.planning.options import Options, Reference
from fxfuse.planning.plan import FusionPlan, MixingMode
from fxfuse.planning.scores import check_score
from fxfuse.planning.widths import Width
from fxfuse.refine.pipeline import Start, matched_start, refitted
from fxfuse.transform.apply import fused_tensors
from fxfuse.transform.resize import Target
from fxfuse.transform.resizing import emit_fused, emit_resized, output_layouts
from fxfuse.transform.sized_plan import make_sized_plan
from fxfuse.transform.wide import concatenation_plan
from fxfuse.verify import equals_ensemble, equals_heads, handover

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def fuse(
    members: Sequence[nn.Module | ExportedProgram | Program | str | Path],
    example_inputs: Any = (),
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    template: nn.Module | None = None,
    group: ProcessGroup | Literal["world"] | None = None,
    plan: FusionPlan | None = None,
    method: str = "transplant",
    score: str | None = None,
    variant: str | None = None,
    base_member: int = 0,
    fraction: float | Mapping[str, float] | None = None,
    reference: Reference = 0,
    regularisation: float | None = None,
    calibration: Any = None,
    calibration_limit: int = 1000,
    calibration_copies: int = 0,
    refit: bool = False,
    outputs: str | None = None,
    steps: int | None = None,
    seconds: float | None = None,
    width: Width | None = None,
    max_params: int | None = None,
    max_flops: int | None = None,
    round_to: int = 1,
    budget: Budget = "local",
    mixing: MixingMode | None = None,
    freeze: Patterns = (),
    share: Patterns = (),
    ignore: Patterns = (),
    output_dims: OutputDims | None = None,
    heads: Patterns = (),
    head_outputs: HeadOutput | None = None,
    classes: Sequence[Sequence[Any]] | None = None,
    dynamic_shapes: Any = None,
    verify: bool = True,
    progress: bool | Progress = False,
) -> FusionResult:
    """Fuses trained networks of one architecture into one network of the same or another width.

    With `heads`, networks for different tasks share one trunk: head i reads the units that come
    from member i with that member's weights, and the others with weight 0. A head that reads what
    the base member keeps starts from nothing there, unless its member is the base member.

    Args:
        members: Two or more networks with the same graph, apart from `heads`. They may differ in
            width (the score decides who provides which unit; with width None, the result has member
            0's size), in the size of heads and groups (where not all is kept, member 0's are), and
            in depth, if some lack residual blocks that others have: then all have the deepest
            one's graph, and a block that a member lacks counts as the identity. Or paths of their
            checkpoints (`.safetensors`, `*.safetensors.index.json`, weights-only `.pt`): besides
            the fused network only one member is in memory then, and the result is the same.
        example_inputs: A tensor or a tuple of inputs that the members accept, batch of at least 2.
            Members that torch.export refuses are traced on them, so they should reach every part.
        example_kwargs: Keyword inputs.
        template: For members that are files: a module of their class, which is left as it is and
            may be on the meta device.
        group: Over several processes, each of which calls with its own `members`: the process group
            of `torch.distributed`, or "world", the default one. The members are rank 0's, then rank
            1's, and so on; a rank may have none, with a template. Each scores and gathers its own,
            and every rank returns what one process with all members would. For `transplant` with a
            score of weights, and for `average`; other options as well, except those that run
            members. The inputs of the rank with member 0 count.
        plan: A plan that was made for these members, to be applied in place of making one. It
            holds the method, its options, the sizes, and what was asked of the analysis, so none
            of that may be given as well. What a refit or matching did after it is not in it.
        method: `transplant` (Neuron Transplantation), `average` (index by index), `weight_matching`
            or `optimal_transport` (average after alignment); `activation_matching` and `zip` need
            calibration inputs, and so does `auto`: of the refitted transplant and every member
            the network closest to the ensemble is matched to it.
        score: Importance of a unit for `transplant`: `l1`, `l2` or `bn_scale`; `activation` and
            `obs` need calibration inputs, `taylor` and `fisher` labels as well. None: `obs` for
            `auto`, else `l2`.
        variant: For `transplant` and `auto`: None, `iterative`, `hierarchical`, or `components`,
            which merges residual streams that only layers, sums and norms over the units meet (as
            in transformers) by what their readers make of them; for `optimal_transport`: `weights`
            or `activations`; for `zip`: None or `across`.
        base_member: The member that keeps every piece that is frozen inside the network.
        fraction: For `transplant`: the share of units that come from other members than the base
        member,
            in [0, 1], or shares by pattern, as `width`; None leaves it to the score.
        reference: For alignment: the member that the others are aligned to, or "mean": each to the
            mean of the others. Where members differ in width, the result has this member's (member
            0's for "mean").
        regularisation: For `optimal_transport`: entropic regularisation, in units of the mean cost;
            None is exact.
        calibration: 100 to 1,000 inputs from the members' own domain: a tensor [n, ...], a tuple or
            mapping of tensors, or an iterable of batches; with labels as pairs (inputs, labels).
        calibration_limit: So many of them are taken at most, in a random order that is always the
            same (of an iterable, the first ones). Memory does not grow with their number, beside
            the inputs themselves.
        calibration_copies: So many augmented copies of each of them are looked at as well wherever
            activations are: copies of images and signals, shifted by up to a position and half of
            them mixed in pairs (`fxfuse.refine.shift_and_mix`).
        refit: Whether to refit the fused network to the members' activations, in closed form; with
            `heads`, each head to its own member's.
        outputs: `logits` or `values`: what the network's output is, for the refit of the head and
            for matching; None lets the output's shape decide.
        steps: For `auto`: budget of the matching in steps; without `seconds`: 300.
        seconds: For `auto`: budget of the matching in CPU seconds.
        width: For `transplant`, `zip` and `auto`: size of the fused network in units of a member,
            in (0, N]; 1 is a member's size, N keeps every unit of every member, which is their mean
            exactly. Or widths by `fnmatch` pattern of the tensors that groups are named after. A
            group that cannot be written in another size keeps its own: the plan's `kept_sizes` says
            why.
        max_params: In place of `width`: the most parameter elements; the widest network is made.
        max_flops: The same for floating-point operations on the example inputs.
        round_to: Channels are rounded to multiples of this, 8 for most hardware.
        budget: `local`: all groups get the width; `global`: all groups together keep as many units
            as they would so, those with the highest score relative to their group's mean, and of
            each group at least one.
        mixing: `per_member`: operators that mix members (LayerNorm and the like) run once for each
            member, so that the wide model is exactly their mean; for width N, where it is the
            default. `joint`: they run over the kept units of all members together.
        freeze: `state_dict()` names of parameters that stay exactly as in the base member, as in
            `analyze`.
        share: `state_dict()` names of parameters whose index means the same in all members.
        ignore: Dotted paths of submodules of which nothing is fused: all is the base member's.
        output_dims: The interface dimensions of outputs, as in `analyze`. Along another dimension
            an output is no mean of the members' any more: it hands out the fused units, in the
            order that the plan says.
        heads: Dotted paths of the modules in which each member keeps its own head, `fnmatch`
            patterns. Heads may differ in shape, and tensors of head i are named `heads.<i>.<name>`.
            Or "concat" or "union": the heads are found, as the modules whose parameters have an
            index for each class, and returned so.
        head_outputs: What a network with heads returns: "tuple" (the default), the outputs of every
            head; "concat", one tensor with the members' logits side by side, for members that know
            different classes; "union", one tensor with the logits of the union of their classes, in
            order of first appearance: the mean of the members that know a class.
        classes: For "union": for each member the names of its classes, in the order of its logits.
        dynamic_shapes: Passed to `torch.export.export` unchanged.
        verify: Whether to run the oracles before handing the network over.
        progress: For `auto`: True shows a bar of the matching on stderr; a `rich.progress.Progress`
            gets a task of its own.

    Returns:
        The fused network, its plan and what was verified.

    Raises:
        MemberError: Fewer than two members, and no plan of one.
        CheckpointError: A member's file is not there, or cannot be opened.
        CheckpointError: A member's file is damaged.
        CheckpointError: A member's file holds other objects than tensors.
        CheckpointError: A member's file does not fit the template.
        PlanError: The plan was made for other members; names the first that differs.
        PlanError: The plan holds no hashes of its members, or does not fit their network.
        InputError: A member rejects the example inputs.
        MemberError: A member holds sparse or quantised tensors.
        MemberError: The members are on the meta device.
        CaptureError: A member cannot be captured.
        MemberError: The members are not the same network.
        CaptureError: torch.export refuses the members, and the example does not reach
            all of their weights.
        MemberError: A member holds NaN or infinity.
        OptionError: No such method or variant.
        OptionError: No such score.
        OptionError: An option names nothing in the network, has a value that the method cannot
            use, or contradicts another one or the plan.
        InputError: The method or the score needs calibration inputs, and there are none; or
            no copies can be made of them.
        MissingDependencyError: The method needs a package that is not installed.
        OptionError: The heads are not found or cannot be kept apart from the trunk, the
            classes are not those of the members, or what is asked for needs members of one task.
        PlanError: No parameter has a free dimension.
        VerificationError: An oracle failed.
        OptionError: A width is no number in (0, N], leaves a group without a unit, or no width
        meets
            the budget.
        RewriteError: The network cannot be written in another size.
    """
    given = dict(locals())
    auto = method == "auto"
    ranks = None if group is None else Ranks(group)
    count = len(members) if ranks is None else sum(ranks.all(lambda: len(members)))
    if plan is not None:
        check_alone(fuse, given)
        check_count(plan, count)
        constraints, own_heads = plan.constraints, plan.heads
    else:
        check_enough(range(count), "fusion")
        constraints = Constraints(freeze, share, ignore, output_dims, base_member)
        own_heads = heads_of(heads, head_outputs, classes)
    if not auto:
        find_method(method)
    if not auto and (steps, seconds) != (None, None):
        raise OptionError(
            "a budget of steps or seconds is for method='auto'",
            why=f"method {method!r} trains nothing",
            how="use method='auto', or fxfuse.refine.match on the result's module",
        )
    score = score or ("obs" if auto else "l2")
    check_score(score)
    target = Target(width, max_params, max_flops, round_to, mixing, budget)
    check_budget(budget, width, given=width is not None or target.is_budget, score=score)
    fitted = auto or refit
    found = gathered(
        members,
        (example_inputs, example_kwargs),
        dynamic_shapes,
        template=template,
        ranks=ranks,
        heads=own_heads,
        calibrated=calibration is not None or fitted,
    )
    found.check_weights()
    network, states, own_heads = found.network, found.states, found.heads
    graph = couple(network, constraints)
    graph = multi_width(graph, found.aligned, lambda member: couple(member, constraints))
    check_base_member(graph, len(states))
    graph, checks = examined(graph, verify=verify)
    inputs = (
        None
        if calibration is None
        else Calibration.of(
            network, calibration, limit=calibration_limit, copies=calibration_copies
        )
    )
    _check_calibrated(graph, inputs, auto=auto, refit=refit)
    if auto and hands_out(graph, constraints):
        raise OptionError(
            "method 'auto' does not work where units are handed out",
            where=f"output_dims={dict(constraints.output_dims)}",
            why="units of an output that is free stand for no others, so there is no ensemble of "
            "them to be matched to",
            how="use method='transplant', with refit=True",
        )
    if plan is None:
        options = Options(
            score,
            variant,
            fraction=fraction,
            reference=reference,
            regularisation=regularisation,
            calibration=inputs,
            absent=found.absent,
        )
        plan = make_sized_plan(graph, states, method, options, target, fitted=fitted)
        plan = replace(plan.made_for(fingerprints(states)), heads=own_heads)
    else:
        check_plan(plan, graph, states)
        if refit and plan.mixing.mode == "per_member":
            raise OptionError(
                "refit=True is not for this plan",
                why="members run one by one in its network, so it is exactly their mean",
                how="leave the refit out",
            )
    start = _start(graph, plan, states)
    told = graph, plan, states, start.state
    if inputs is not None and auto:
        start = matched_start(
            *told, inputs, outputs, steps=steps, seconds=seconds, progress=progress
        )
    elif inputs is not None and refit:
        start = refitted(*told, inputs, outputs)
    module = start.module
    if module is None and network.is_exported:
        module = emit_fused(graph, start.plan, start.state)
    handed_out = bool(constraints.output_dims)
    if verify:
        grown = output_layouts(graph, start.plan) if handed_out and network.is_exported else None
        checks += handover(network, module or _eager(network, start.state), grown)
    if verify and plan.mixing.mode == "per_member" and own_heads:
        checks.append(equals_heads(graph, states, plan, found.given, found.dim))
    elif verify and plan.mixing.mode == "per_member":
        checks.append(equals_ensemble(graph, states, plan, hands_out=handed_out))
    elif verify and graph.members:
        wide = concatenation_plan(graph, states, "joint")
        checks.append(equals_ensemble(graph, states, wide, hands_out=handed_out))
    return FusionResult(
        start.plan,
        verified(checks),
        graph,
        start.state,
        module,
        start.refit,
        start.choice,
        start.match,
        found.given[0] if own_heads else None,
    )


def _start(
    graph: CouplingGraph, plan: FusionPlan, states: Sequence[Mapping[str, torch.Tensor]]
) -> Start:
    """The network of a plan: a member's graph with other tensors, or one of another size."""
    same = all(plan.sizes()[group.name] == group.n_units for group in graph.groups)
    if same and plan.mixing.mode == "joint":
        return Start(plan, fused_tensors(graph, plan, states))
    wide = emit_resized(graph, plan, states)
    return Start(plan, wide.state_dict(), module=wide)


def _check_calibrated(
    graph: CouplingGraph, inputs: Calibration | None, *, auto: bool, refit: bool
) -> None:
    """Checks that what is asked for can be measured."""
    what = 'method "auto"' if auto else "refit=True"
    if graph.program.heads and auto:
        raise OptionError(
            f"{what} does not work with several heads",
            why="the members' heads have other tasks, so there is no one network to choose a start "
            "by and to match",
            how="use method='transplant' with refit=True, and train the result with "
            "fxfuse.refine.finetune",
        )
    if not (auto or refit):
        return
    if inputs is None:
        raise InputError(
            f"{what} needs calibration inputs",
            why="layers are fitted to what the members answer on them",
            how="pass calibration=..., 100 to 1,000 inputs without labels",
        )
    graph.program.require_exported()


def _eager(member: Program, state: Mapping[str, torch.Tensor]) -> Callable[..., Any]:
    """The user's own module with other tensors, as a function of its inputs."""
    source = member.source
    assert source is not None

    def call(*args: Any, **kwargs: Any) -> Any:
        return answers(source, member.once(state), args, kwargs)

    return call
