"""The whole way: members → capture → analyze → plan → apply → rewrite → verify."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite
from typing import Any, TypeVar

import torch
from torch import nn
from torch.export import ExportedProgram

from fxfuse.apply import fused_tensors
from fxfuse.calibration import Calibration
from fxfuse.capture import Captured, capture, capture_eagerly, check_reached
from fxfuse.controls import OutputDims, Patterns
from fxfuse.coupling import CouplingGraph, analyze
from fxfuse.eager import answers
from fxfuse.errors import (
    CalibrationError,
    CheckpointMismatchError,
    ControlError,
    NoOwnModuleError,
    NothingToFuseError,
    PartialFusionError,
    VerificationError,
)
from fxfuse.finish import Choice, Start, matched_start, refitted
from fxfuse.freezing import excused
from fxfuse.heads import join
from fxfuse.members import check_alike, check_enough, check_finite, check_model, check_values
from fxfuse.methods import find_method
from fxfuse.options import Options, Reference
from fxfuse.plan import FusionPlan, Mixing
from fxfuse.planner import make_plan
from fxfuse.refine import MatchReport, RefitReport
from fxfuse.resize import Target, mixing_of, resized
from fxfuse.rewrite import FusedModule
from fxfuse.same_network import check_same_network
from fxfuse.scores import check_score
from fxfuse.verify import (
    Check,
    Verification,
    equals_ensemble,
    handover,
    permutation_of,
    wrong_groups,
)
from fxfuse.wide import wide_plan
from fxfuse.widen import emit_fused, widen
from fxfuse.widths import Width

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class FusionResult:
    """A fused network.

    Attributes:
        plan: Which unit of which member went where.
        verification: The oracles that ran.
        graph: The analysis of the members.
        refit: What the closed-form refit did, if one was asked for.
        choice: For `method="auto"`: which network was the start, and why.
        match: For `method="auto"`: what the matching did.
    """

    plan: FusionPlan
    verification: Verification
    graph: CouplingGraph = field(repr=False)
    _state: Mapping[str, torch.Tensor] = field(repr=False)
    _module: FusedModule | None = field(repr=False)
    refit: RefitReport | None = field(default=None, repr=False)
    choice: Choice | None = None
    match: MatchReport | None = field(default=None, repr=False)

    @property
    def emitted(self) -> bool:
        """Whether there is a `module`: False where torch.export refused the members."""
        return self._module is not None

    @property
    def module(self) -> FusedModule:
        """The network: `train()`/`eval()`, picklable, exportable, compilable with `fullgraph=True`.

        Its `state_dict()` has the names of a member's, at a member's width the shapes, too.

        Raises:
            NotEmittedError: torch.export refused the members; `to_module` works all the same.
        """
        if self._module is None:
            self.graph.captured.require_program()
        assert self._module is not None
        return self._module

    @property
    def heads(self) -> Mapping[str, int]:
        """Tensors of a partial fusion's heads, by name → the member that each belongs to."""
        return self.plan.heads

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The fused tensors by name; those of `module`, where there is one."""
        return dict(self._state) if self._module is None else self._module.state_dict()

    def _require_one_head(self, name: str) -> None:
        if self.heads:
            raise PartialFusionError(
                f"a network with {self.plan.n_members} heads does not fit {name}",
                why="the members' class has one head",
                how="use result.module, or build a class whose state_dict() has the names of "
                "result.state_dict()",
            )

    def to_module(self) -> nn.Module:
        """A copy of member 0, of the user's own class and in the mode it has, with fused weights.

        Raises:
            NoOwnModuleError: Member 0 was an `ExportedProgram`, or it cannot be copied.
            PartialFusionError: The members keep a head each.
        """
        source = self.graph.captured.source
        self._require_one_head("a member's class")
        if source is None:
            raise NoOwnModuleError(
                "there is no module to copy",
                why="member 0 was given as an ExportedProgram, which holds no module of your class",
                how="use result.module, or build your model and call result.load_into(model)",
            )
        try:
            model = copy.deepcopy(source)
        except Exception as error:
            raise NoOwnModuleError(
                f"{type(source).__name__} cannot be copied",
                why=f"{type(error).__name__}: {error}",
                how="build a second model and call result.load_into(model)",
            ) from error
        return self.load_into(model)

    def load_into(self, model: Model) -> Model:
        """Loads the fused weights into the user's own class, strictly; returns that model.

        Raises:
            CheckpointMismatchError: The model has other tensors.
            PartialFusionError: The network has several heads, and a member's class only one.
        """
        self._require_one_head(type(model).__name__)
        try:
            model.load_state_dict(self.state_dict(), strict=True)
        except RuntimeError as error:
            raise CheckpointMismatchError(
                f"the fused network does not fit {type(model).__name__}",
                why=" ".join(str(error).split()),
                how="build the model with the arguments that the members were built with, or at "
                "another width with sizes that fit; result.module has them",
            ) from error
        return model


def fuse(
    members: Sequence[nn.Module | ExportedProgram | Captured],
    example_inputs: Any = (),
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    method: str = "transplant",
    score: str | None = None,
    variant: str | None = None,
    host: int = 0,
    fraction: float | None = None,
    reference: Reference = 0,
    regularisation: float | None = None,
    calibration: Any = None,
    refit: bool = False,
    outputs: str | None = None,
    steps: int | None = None,
    seconds: float | None = None,
    width: Width | None = None,
    max_params: int | None = None,
    max_flops: int | None = None,
    round_to: int = 1,
    mixing: Mixing | None = None,
    freeze: Patterns = (),
    share: Patterns = (),
    ignore: Patterns = (),
    output_dims: OutputDims | None = None,
    heads: Patterns = (),
    dynamic_shapes: Any = None,
    verify: bool = True,
) -> FusionResult:
    """Fuses trained networks of one architecture into one network of the same or another width.

    With `heads`, networks for different tasks share one trunk: head i reads the units that come
    from member i with that member's weights, and the others with weight 0. A head that reads what
    the host keeps starts from nothing there, unless its member is the host.

    Args:
        members: Two or more networks with the same graph and the same shapes, apart from `heads`.
        example_inputs: A tensor or a tuple of inputs that the members accept, batch of at least 2.
            Members that torch.export refuses are traced on them, so they should reach every part.
        example_kwargs: Keyword inputs.
        method: `transplant` (Neuron Transplantation), `average` (index by index), `weight_matching`
            or `optimal_transport` (average after alignment); `activation_matching` and `zip` need
            calibration inputs, and so does `auto`: of the refitted transplant and every member
            the network closest to the ensemble is matched to it.
        score: Importance of a unit for `transplant`: `l1`, `l2` or `bn_scale`; `activation` and
            `obs` need calibration inputs, `taylor` and `fisher` labels as well. None: `obs` for
            `auto`, else `l2`.
        variant: For `transplant`: None, `iterative` or `hierarchical`; for `optimal_transport`:
            `weights` or `activations`; for `zip`: None or `across`.
        host: The member that keeps every piece that is frozen inside the network.
        fraction: For `transplant`: the share of units that come from other members than the host,
            in [0, 1]; None leaves it to the score.
        reference: For alignment: the member that the others are aligned to, or "mean": each to the
            mean of the others.
        regularisation: For `optimal_transport`: entropic regularisation, in units of the mean cost;
            None is exact.
        calibration: 100 to 1,000 inputs from the members' own domain: a tensor [n, ...], a tuple or
            mapping of tensors, or an iterable of batches; with labels as pairs (inputs, labels).
        refit: Whether to refit the fused network to the members' activations, in closed form.
        outputs: `logits` or `values`: what the network's output is, for the refit of the head and
            for matching; None lets the output's shape decide.
        steps: For `auto`: budget of the matching in steps; without `seconds`: 300.
        seconds: For `auto`: budget of the matching in CPU seconds.
        width: For `transplant` and `auto`: size of the fused network in units of a member, in
            (0, N]; 1 is a member's size, N keeps every unit of every member, which is their mean
            exactly. Or widths by `fnmatch` pattern of the tensors that groups are named after. A
            group that cannot be written in another size keeps its own: the plan's `refused` says
            why.
        max_params: In place of `width`: the most parameter elements; the widest network is made.
        max_flops: The same for floating-point operations on the example inputs.
        round_to: Channels are rounded to multiples of this, 8 for most hardware.
        mixing: `per_member`: operators that mix members (LayerNorm and the like) run once for each
            member, so that the wide model is exactly their mean; for width N, where it is the
            default. `joint`: they run over the kept units of all members together.
        freeze: `state_dict()` names of parameters that stay exactly as in the host, as in
            `analyze`.
        share: `state_dict()` names of parameters whose index means the same in all members.
        ignore: Dotted paths of submodules of which nothing is fused: all is the host's.
        output_dims: The interface dimensions of outputs, as in `analyze`. Along another dimension
            an output is no mean of the members' any more: it hands out the fused units, in the
            order that the plan says.
        heads: Dotted paths of the modules in which each member keeps its own head, `fnmatch`
            patterns. Heads may differ in shape. The fused network then returns a tuple with the
            outputs of every head, and tensors of head i are named `heads.<i>.<name>`.
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
        UnreachedParametersError: torch.export refuses the members, and the example does not reach
            all of their weights.
        NonFiniteWeightsError: A member holds NaN or infinity.
        UnknownMethodError: No such method or variant.
        UnknownScoreError: No such score.
        ControlError: An option names nothing in the network, has a value that the method cannot
            use, or contradicts another one.
        CalibrationError: The method or the score needs calibration inputs, and there are none.
        MissingDependencyError: The method needs a package that is not installed.
        PartialFusionError: The heads cannot be kept apart from the trunk.
        NothingToFuseError: No parameter has a free dimension.
        VerificationError: An oracle failed.
        WidthError: A width is no number in (0, N], leaves a group without a unit, or no width meets
            the budget.
        RewriteError: The network cannot be written in another size.
    """
    check_enough(members, "fusion")
    auto = method == "auto"
    if not auto:
        find_method(method)
    if not auto and (steps, seconds) != (None, None):
        raise ControlError(
            "a budget of steps or seconds is for method='auto'",
            why=f"method {method!r} trains nothing",
            how="use method='auto', or fxfuse.refine.match on the result's module",
        )
    score = score or ("obs" if auto else "l2")
    check_score(score)
    for member in members:
        if not isinstance(member, Captured):
            check_model(member)
    check_alike(members)
    captured = _capture_all(members, example_inputs, example_kwargs, dynamic_shapes)
    network, states = _as_one(captured, heads)
    for number, state in enumerate(states):
        check_values(state)
        check_finite(number, state)
    graph = analyze(network, freeze=freeze, share=share, ignore=ignore, output_dims=output_dims)
    check_reached(network, excused(graph.asked))
    checks = []
    if verify:
        graph, check = _only_what_moves(graph)
        checks.append(check)
    _check_free(graph)
    inputs = None if calibration is None else Calibration.of(network, calibration)
    _check_calibrated(graph, inputs, auto=auto, refit=refit)
    if method == "wide":
        width = _width_of_all(width, len(states))
    target = Target(width, max_params, max_flops, round_to, mixing)
    mixing = mixing_of(graph, len(states), target, fitted=auto or refit)
    found = resized(graph, len(states), target, mixing)
    if found is not None:
        _check_resizable(found[0], graph, method)
    sizes, refused = found or (None, {})
    options = Options(
        score,
        variant,
        fraction=fraction,
        reference=reference,
        regularisation=regularisation,
        calibration=inputs,
        sizes=sizes,
    )
    if mixing == "per_member":
        plan = wide_plan(graph, states, host=host)
    else:
        plan = make_plan(graph, states, "transplant" if auto else method, options, host=host)
    plan = replace(plan, refused=refused)
    if sizes is None:
        start = Start(plan, fused_tensors(graph, plan, states))
    else:
        wide = widen(graph, plan, states)
        start = Start(plan, wide.state_dict(), module=wide)
    told = graph, plan, states, start.state
    if inputs is not None and auto:
        start = matched_start(*told, inputs, outputs, steps=steps, seconds=seconds)
    elif inputs is not None and refit:
        start = refitted(*told, inputs, outputs)
    module = start.module
    if module is None and network.is_program:
        module = emit_fused(graph, start.plan, start.state)
    if verify:
        checks += handover(network, module or _eager(network, start.state))
    if verify and mixing == "per_member":
        checks.append(equals_ensemble(graph, states, plan))
    verification = Verification(tuple(checks))
    _check_verified(verification)
    return FusionResult(
        start.plan,
        verification,
        graph,
        start.state,
        module,
        start.refit,
        start.choice,
        start.match,
    )


def _width_of_all(width: Width | None, n_members: int) -> Width:
    if width not in (None, n_members):
        raise ControlError(
            f"width {width} and method 'wide' contradict each other",
            why=f"it keeps every unit of every member, which is width {n_members}",
            how="leave the width out, or use method='transplant'",
        )
    return n_members


def _check_resizable(sizes: Mapping[str, int], graph: CouplingGraph, method: str) -> None:
    """Checks that a method works at another width than a member's."""
    if all(sizes[group.name] == group.n_units for group in graph.groups):
        return
    if method in ("auto", "transplant", "wide"):
        return
    raise ControlError(
        f"method {method!r} works at a member's width only",
        why="it gives every fused unit the place of a member's unit",
        how="leave the width out, or use method='transplant' or 'auto'",
    )


def _check_calibrated(
    graph: CouplingGraph, inputs: Calibration | None, *, auto: bool, refit: bool
) -> None:
    """Checks that what is asked for can be measured."""
    what = 'method "auto"' if auto else "refit=True" if refit else "calibration="
    if graph.captured.heads and (inputs is not None or auto or refit):
        raise PartialFusionError(
            f"{what} does not work with several heads",
            why="the members' heads have other tasks, so there is no one network to compare with",
            how="fuse without it, and train the heads with fxfuse.refine.finetune or distill",
        )
    if not (auto or refit):
        return
    if inputs is None:
        raise CalibrationError(
            f"{what} needs calibration inputs",
            why="layers are fitted to what the members answer on them",
            how="pass calibration=..., 100 to 1,000 inputs without labels",
        )
    graph.captured.require_program()


def _capture_all(
    members: Sequence[nn.Module | ExportedProgram | Captured],
    inputs: Any,
    kwargs: Mapping[str, Any] | None,
    dynamic_shapes: Any,
) -> list[Captured]:
    captured: list[Captured] = []
    for member in members:
        refusal = captured[0].refusal if captured else ""
        if isinstance(member, Captured):
            captured.append(member)
        elif refusal and isinstance(member, nn.Module):
            # torch.export refuses the first one: it is not asked, and does not warn, again.
            captured.append(capture_eagerly(member, inputs, kwargs, refusal=refusal))
        else:
            captured.append(capture(member, inputs, kwargs, dynamic_shapes=dynamic_shapes))
    return captured


def _eager(member: Captured, state: Mapping[str, torch.Tensor]) -> Callable[..., Any]:
    """The user's own module with other tensors, as a function of its inputs."""
    source = member.source
    assert source is not None

    def call(*args: Any, **kwargs: Any) -> Any:
        return answers(source, member.once(state), args, kwargs)

    return call


def _as_one(
    captured: Sequence[Captured], heads: Patterns
) -> tuple[Captured, Sequence[Mapping[str, torch.Tensor]]]:
    """The network to fuse, and the tensors that each member has of it."""
    if heads:
        joined = join(captured, heads)
        return joined.captured, joined.states
    check_same_network(captured)
    return captured[0], [c.state() for c in captured]


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
        how="see fxfuse.analyze(...).frozen for all reasons; "
        + (
            "freeze, share and ignore may ask for too much"
            if graph.asked
            else "an operator without a rule can get one in fxfuse/rules/"
        ),
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
