"""The stages of a fusion: analyze an ensemble, plan, build and refine a network, verify it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fxfuse.activations.calibration import CalibrationBatches
from fxfuse.activations.statistics import warn_of_statistics
from fxfuse.analysis.constraints import Constraints
from fxfuse.analysis.coupling import CouplingGraph, couple, hands_out
from fxfuse.analysis.label_spaces import Heads
from fxfuse.analysis.multi_width import check_base_member, multi_width
from fxfuse.api.checks import check_plan, check_sound, verified
from fxfuse.api.load_members import Ensemble, load_members
from fxfuse.api.result import FusionResult, class_of
from fxfuse.common.options import check_type
from fxfuse.errors import InputError, OptionError
from fxfuse.graph.capture import Program
from fxfuse.graph.example import Example
from fxfuse.graph.run import answers
from fxfuse.members.fingerprint import fingerprints
from fxfuse.members.members import Members
from fxfuse.members.streamed import Network
from fxfuse.planning.context import Context
from fxfuse.planning.methods import Method, Transplant, find_method
from fxfuse.planning.plan import FusionPlan
from fxfuse.planning.size import Size
from fxfuse.refine import Match, Refit, Task
from fxfuse.refine.infer_task import task_of_all
from fxfuse.refine.pipeline import Refined, Steps, refined, resolve_steps
from fxfuse.refine.task import as_task
from fxfuse.transform.apply import fused_tensors
from fxfuse.transform.cost import latency_of
from fxfuse.transform.emit import FusedModule
from fxfuse.transform.resizing import emit_fused, emit_resized, output_layouts
from fxfuse.transform.sizes import concatenation_plan, make_sized_plan
from fxfuse.verify import Check, equals_ensemble, equals_heads, handover

if TYPE_CHECKING:
    from rich.progress import Progress

State = Mapping[str, torch.Tensor]

#: Less than this share of the change that was asked for is little.
_LITTLE = 0.25


@dataclass(frozen=True)
class Refinement:
    """What follows a fusion, and the inputs for it.

    Attributes:
        steps: Refit and matching.
        calibration: The calibration inputs, as they were given.
    """

    steps: Steps
    calibration: Any = None

    @staticmethod
    def of(
        steps: Sequence[Refit | Match] | None,
        calibration: Any,
        task: Any,
        progress: bool | Progress,
        method: Method | None,
        *,
        matchable: bool = True,
    ) -> Refinement:
        """Check and sort what a caller asked for; without `steps` the calibration inputs decide.

        `method` is what plans the fusion, unless there is a plan; `matchable` says whether there is
        an ensemble to be matched.

        Raises:
            InputError: Calibration inputs are missing, or there is no use for them.
        """
        refit, match = resolve_steps(steps, calibrated=calibration is not None, matchable=matchable)
        unused = refit is None and match is None and (method is None or method.weights_only)
        if calibration is not None and unused:
            planned = "the plan" if method is None else f"method={method!r}"
            raise InputError(
                "there is no use for the calibration inputs",
                where="calibration",
                why=f"nothing follows the fusion (refine=[]), and {planned} does not look at them",
                how="pass refine=[Refit(), Match()] or one of them, or leave calibration out",
            )
        return Refinement(Steps(refit, match, as_task(task), progress), calibration)

    def __bool__(self) -> bool:
        """Whether anything follows."""
        return bool(self.steps)

    def batches(self, program: Program) -> CalibrationBatches | None:
        """Return the calibration inputs, checked and cut into batches."""
        if self.calibration is None:
            return None
        batches = CalibrationBatches.of(program, self.calibration)
        warn_of_statistics(program, batches)
        return batches


def plan(
    graph: CouplingGraph,
    members: Sequence[Network | str | Path] | Members,
    method: str | Method = "transplant",
    *,
    size: float | Mapping[str, float] | Size | None = None,
    calibration: Any = None,
    refine: Sequence[Refit | Match] = (),
) -> FusionPlan:
    """Plan a fusion: which unit of which member goes where, before any weight is touched.

    Args:
        graph: The analysis of member 0, with the constraints (`fxfuse.analyze`).
        members: The members, as in `fxfuse.fuse`.
        method: How units are chosen and combined, as in `fxfuse.fuse`.
        size: Size of the result, as in `fxfuse.fuse`.
        calibration: Calibration inputs, for methods and scores that measure activations.
        refine: What will follow the fusion: a refit keeps operators that mix members joint.

    Raises:
        MemberError: The members are not the same network.
        OptionError: An option has a value that the method cannot use.
        InputError: The method or the score needs calibration inputs, and there are none.
    """
    check_type("graph", graph, CouplingGraph, how="pass what fxfuse.analyze returned")
    given, chosen, wanted = Members.of(members), find_method(method), Size.of(size)
    args, kwargs = graph.program.example_inputs
    refinement = Refinement.of(refine, calibration, None, False, chosen)
    known = [graph.program if m is graph.program.source else m for m in given.networks]
    ensemble = load_members(
        replace(given, networks=known),
        Example(args, kwargs),
        Heads(()),
        runs_members=calibration is not None,
    )
    if ensemble.network is not graph.program:
        graph, _ = analyze_ensemble(ensemble, graph.constraints, verify=False)
    elif len({id(program) for program in ensemble.aligned}) > 1:
        graph = multi_width(
            graph, ensemble.aligned, lambda member: couple(member, graph.constraints)
        )
    planner = Planner(graph, ensemble, chosen, wanted, fitted=bool(refinement))
    return planner.plan(refinement.batches(graph.program))


def build(
    plan: FusionPlan,
    members: Sequence[Network | str | Path] | Members,
    example: Any = (),
    *,
    calibration: Any = None,
    task: Task | None = None,
    refine: Sequence[Refit | Match] = (),
    verify: bool = True,
    progress: bool | Progress = False,
) -> FusionResult:
    """Build the network of a plan from the members that it was made for.

    Args:
        plan: A plan of `fxfuse.plan`, of an earlier result, or of `FusionPlan.from_json`. It holds
            the method, its options, the sizes, the constraints and the heads.
        members: The members that it was made for, in the same order.
        example: Example inputs, as in `fxfuse.fuse`; not needed where members are captured.
        calibration: Calibration inputs, for `refine`. Use other inputs than those that the plan was
            made from: units look better on inputs that they were chosen on.
        task: What the output means.
        refine: What follows: a plan holds no refit and no matching.
        verify: Whether to run the oracles before the network is returned.
        progress: Progress of the matching, as in `fxfuse.fuse`.

    Raises:
        PlanError: The plan was made for other members, or does not fit their network.
        MemberError: The members differ, or hold no finite dense weights.
        VerificationError: An oracle failed.
    """
    check_type(
        "plan", plan, FusionPlan, how="pass what fxfuse.plan or FusionPlan.from_json returned"
    )
    refinement = Refinement.of(refine, calibration, task, progress, None)
    given = Members.of(members)
    if not given.networks or isinstance(given.networks[0], Program):
        first = given.networks[0] if given.networks else None
        args, kwargs = first.example_inputs if isinstance(first, Program) else ((), {})
        example = Example(args, kwargs)
    ensemble = load_members(
        given,
        Example.of(example),
        plan.heads,
        runs_members=calibration is not None,
        count=plan.n_members,
    )
    graph, checks = analyze_ensemble(ensemble, plan.constraints, verify=verify)
    check_plan(plan, graph, ensemble.states)
    if refinement and plan.mixing.mode == "per_member":
        raise OptionError(
            "refine is not for this plan",
            why="members run one by one in its network, so it is exactly their mean",
            how="leave refine out",
        )
    planner = Planner(graph, ensemble, find_method(plan.method), Size(), given=plan)
    return build_network(planner, refinement, checks, verify=verify)


def analyze_ensemble(
    ensemble: Ensemble, constraints: Constraints, *, verify: bool
) -> tuple[CouplingGraph, list[Check]]:
    """Analyze what can be fused of an ensemble, and run the permutation oracle if `verify`."""
    graph = couple(ensemble.network, constraints)
    graph = multi_width(graph, ensemble.aligned, lambda member: couple(member, constraints))
    check_base_member(graph, len(ensemble.states))
    return check_sound(graph, verify=verify)


def in_architecture(
    constraints: Constraints, ensemble: Ensemble, refinement: Refinement
) -> Constraints:
    """The constraints of those members that have the base member's architecture.

    The others reach the result only through what follows the fusion.
    """
    if not refinement:
        raise OptionError(
            "members of different architectures are not fused without refit or matching",
            where="refine=[]",
            why="no weight of theirs stands for another's, so nothing of them would be in the "
            "result",
            how="leave refine out, or pass refine=[Refit(), Match()] or one of them",
        )
    if refinement.steps.task is None:
        task_of_all(ensemble.architectures)
    base = ensemble.numbers.index(constraints.base_member)
    return constraints.and_also(Constraints(base_member=base))


@dataclass(frozen=True)
class Planner:
    """Plans the fusion of an analyzed ensemble, from the inputs that a fit may see.

    Attributes:
        graph: The analysis.
        ensemble: The members.
        method: How units are chosen and combined.
        size: Size of the result.
        fitted: Whether layers will be fitted, to units of all members.
        origin: Digest of the plan that the only member was made with.
        given: A plan that is there already.
    """

    graph: CouplingGraph
    ensemble: Ensemble
    method: Method
    size: Size
    fitted: bool = False
    origin: str = ""
    given: FusionPlan | None = None

    def plan(self, batches: CalibrationBatches | None) -> FusionPlan:
        """Plan the fusion; the method may look at these inputs."""
        if self.method.weights_only and self.outline is not None:
            return self.outline
        return self._planned(self.method, batches)

    @cached_property
    def outline(self) -> FusionPlan | None:
        """The plan with a score of weights: sizes and roles, without a look at any input.

        None where the method itself needs activations.
        """
        method = self.method
        if isinstance(method, Transplant) and not method.weights_only:
            method = replace(method, score="l2")
        return self._planned(method, None) if method.weights_only or self.given else None

    @cached_property
    def uniform(self) -> Planner | None:
        """What plans all groups equally wide, where widths are chosen group by group."""
        if self.given is not None or self.size.allocation == "uniform":
            return None
        return replace(self, size=replace(self.size, allocation="uniform"))

    def state(self, plan: FusionPlan) -> State:
        """The fused tensors of a plan, by name."""
        _, state = _built(self.graph, plan, self.ensemble.states)
        return state

    def _planned(self, method: Method, batches: CalibrationBatches | None) -> FusionPlan:
        if self.given is not None:
            return self.given
        graph, ensemble = self.graph, self.ensemble
        context = Context(
            graph.constraints.base_member, absent=ensemble.absent, calibration=batches
        )
        made = make_sized_plan(
            graph, ensemble.states, method, context, self.size, fitted=self.fitted
        )
        known = made.made_for(fingerprints(ensemble.states), self.origin)
        return replace(known, heads=ensemble.heads)


def build_network(
    planner: Planner,
    refinement: Refinement,
    checks: Sequence[Check],
    *,
    batches: CalibrationBatches | None = None,
    verify: bool,
) -> FusionResult:
    """Plan, build the network, refine it, and verify what came out.

    `checks` are the oracles that ran before, `batches` the calibration inputs where they are
    checked already.
    """
    graph, ensemble = planner.graph, planner.ensemble
    network, states = ensemble.network, ensemble.states
    _check_refinable(graph, refinement)
    found: Refined | None = None
    if refinement:
        given = batches or refinement.batches(graph.program)
        assert given is not None
        judged = not network.heads and not hands_out(graph, graph.constraints)
        found = refined(planner, given, refinement.steps, judged=judged)
        plan = found.plan
        state: State = found.module.state_dict()
        module: FusedModule | None = found.module
        if found.members is not None:
            states = [states[member] for member in found.members]
    else:
        plan = planner.plan(batches)
        module, state = _built(graph, plan, states)
    if module is None and network.is_exported:
        module = emit_fused(graph, plan, state)
    if module is not None:
        _warn_of_little_change(planner.size, plan, graph, module)
    checks = list(checks)
    if verify:
        free = bool(graph.constraints.output_dims) and network.is_exported
        grown = output_layouts(graph, plan) if free else None
        checks += handover(network, module or _as_function(network, state), grown)
        checks += _ensemble_checks(graph, ensemble, states, plan)
    return FusionResult(
        plan,
        verified(checks),
        graph,
        state,
        module,
        found.refit if found else None,
        found.history if found else None,
        found.match if found else None,
        ensemble.given[0] if ensemble.heads else None,
        {i: class_of(other) for i, other in ensemble.others.items()},
        found.moved if found else None,
        _latency(planner, module),
    )


def _latency(planner: Planner, module: FusedModule | None) -> float | None:
    """What the network takes, where a latency was asked for."""
    size = planner.size
    if size.latency is None or module is None:
        return None
    return latency_of(module, planner.graph.program, size.batch)


def _warn_of_little_change(
    size: Size, plan: FusionPlan, graph: CouplingGraph, module: FusedModule
) -> None:
    """Warn where another size was asked for and nearly all weights stayed."""
    if not isinstance(size.width, int | float):
        return
    before = sum(p.numel() for p in graph.program.module.parameters())
    after = sum(p.numel() for p in module.parameters())
    ratio, wanted = after / max(before, 1), size.width
    if abs(ratio - 1) >= _LITTLE * abs(wanted - 1):
        return
    whys = [*plan.kept_sizes.values(), *graph.single_units.values()]
    whys += [reason.why for reason in graph.frozen.values() if not reason.interface]
    found = "; ".join(dict.fromkeys(whys[:3])) or "most weights belong to no coupling group"
    warnings.warn(
        f"at size {wanted:g} the network has {ratio:.0%} of a member's weights ({after} instead of "
        f"{before}): {found}. print(result.graph) lists what is frozen or moves in one piece.",
        stacklevel=4,
    )


def _built(
    graph: CouplingGraph, plan: FusionPlan, states: Sequence[State]
) -> tuple[FusedModule | None, State]:
    """The network of a plan, where it has another size than a member, and its tensors."""
    same = all(plan.sizes()[group.name] == group.n_units for group in graph.groups)
    if same and plan.mixing.mode == "joint":
        return None, fused_tensors(graph, plan, states)
    module = emit_resized(graph, plan, states)
    return module, module.state_dict()


def _check_refinable(graph: CouplingGraph, refinement: Refinement) -> None:
    """Check that what is to follow a fusion can be measured."""
    if not refinement:
        return
    graph.program.require_exported()
    if refinement.steps.match is None:
        return
    how = "pass refine=[Refit()], and train the result with fxfuse.refine.finetune"
    if graph.program.heads:
        raise OptionError(
            "matching does not work with several heads",
            where="refine",
            why="the members' heads have other tasks, so there is no one network to choose a start "
            "by and to match",
            how=how,
        )
    if hands_out(graph, graph.constraints):
        raise OptionError(
            "matching does not work where outputs are free",
            where=f"output_dims={dict(graph.constraints.output_dims)}",
            why="units of a free output stand for no others, so there is no ensemble of them to be "
            "matched to",
            how=how,
        )


def _ensemble_checks(
    graph: CouplingGraph, ensemble: Ensemble, states: Sequence[State], plan: FusionPlan
) -> list[Check]:
    """The oracles that compare with the ensemble itself."""
    free = bool(graph.constraints.output_dims)
    if plan.mixing.mode == "per_member" and ensemble.heads:
        return [equals_heads(graph, states, plan, ensemble.given, ensemble.dim)]
    if plan.mixing.mode == "per_member":
        return [equals_ensemble(graph, states, plan, hands_out=free)]
    if graph.members:
        whole = concatenation_plan(graph, states, "joint")
        return [equals_ensemble(graph, states, whole, hands_out=free)]
    return []


def _as_function(member: Program, state: State) -> Callable[..., Any]:
    """Return the user's own module with other tensors, as a function of its inputs."""
    source = member.source
    assert source is not None

    def call(*args: Any, **kwargs: Any) -> Any:
        return answers(source, member.once(state), args, kwargs)

    return call
