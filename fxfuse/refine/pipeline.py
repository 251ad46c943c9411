"""What follows the transplant: refit, the choice of a start, matching to the ensemble."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from fxfuse.activations.calibration import CalibrationBatches
from fxfuse.analysis.coupling import CouplingGraph
from fxfuse.errors import InputError, OptionError
from fxfuse.planning.plan import FusionPlan, Mixing, UnitMap
from fxfuse.planning.roles import Role, RoleKind
from fxfuse.refine.batch import logits_of
from fxfuse.refine.distance import distance
from fxfuse.refine.match import Match, MatchReport, match
from fxfuse.refine.outputs import kind_of_network
from fxfuse.refine.regression import Refit, RefitReport, refit_state
from fxfuse.refine.task import Task
from fxfuse.transform.emit import FusedModule, emit
from fxfuse.transform.layout import copies_of
from fxfuse.transform.resizing import emit_fused

if TYPE_CHECKING:
    from rich.progress import Progress

#: Share of the calibration inputs that choose the start; the refit does not see them.
_HELD_OUT = 0.25

State = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Choice:
    """Which network the matching started from.

    Attributes:
        start: `fused` or `member <i>`; always `fused` at another width than a member's, and for
            members of different widths.
        divergence: For each start, how far its outputs are from the ensemble's on calibration
            inputs that no fit has seen: KL divergence in nats for class logits, else the mean
            squared difference relative to the outputs' variance.
        before: The same of the chosen start on the inputs that the matching holds out, copies of
            them where it makes some (`MatchReport.before`). Members that were trained on the
            calibration inputs answer there like the ensemble from memory, and on copies they do
            not; so the two are not to be compared.
        after: As `before`, of the network that is handed over; never above it.
        kept: Whether the matching was kept; it is not where it did not bring the start closer.
    """

    start: str
    divergence: Mapping[str, float]
    before: float
    after: float
    kept: bool = True

    def __str__(self) -> str:
        """What was chosen and why."""
        each = ", ".join(f"{name} {value:.3g}" for name, value in self.divergence.items())
        end = (
            f"matching brought it from {self.before:.3g} to {self.after:.3g} on inputs of its own"
            if self.kept
            else "which matching did not improve"
        )
        why = (
            "closest to the ensemble"
            if len(self.divergence) > 1
            else "the only start at this width"
        )
        return f"started from {self.start}, {why} on held-out inputs ({each}); {end}"


@dataclass(frozen=True)
class Start:
    """A network to go on from.

    Attributes:
        plan: Which unit of which member went where.
        state: Its tensors by name.
        refit: What the refit did, if there was one.
        module: The network, once it has been matched; its tensors are others then.
        choice: What was chosen from.
        match: What the matching did.
    """

    plan: FusionPlan
    state: State
    refit: RefitReport | None = None
    module: FusedModule | None = None
    choice: Choice | None = None
    match: MatchReport | None = None


def resolve_steps(
    steps: Sequence[Refit | Match] | None, *, calibrated: bool, matchable: bool = True
) -> tuple[Refit | None, Match | None]:
    """The refit and the matching that follow a fusion.

    Args:
        steps: What a caller asked for; None: both, where there are calibration inputs.
        calibrated: Whether there are calibration inputs.
        matchable: Whether there is an ensemble to be matched: without it, None means a refit only.

    Raises:
        OptionError: A step is no refit and no matching, is there twice, or they are out of order.
        InputError: There is a step, and no calibration inputs.
    """
    if steps is None:
        default = (Refit(), Match()) if matchable else (Refit(), None)
        return default if calibrated else (None, None)
    kinds = [type(step) for step in steps]
    if kinds not in ([], [Refit], [Match], [Refit, Match]):
        raise OptionError(
            f"refine={list(steps)!r} is not a sequence of steps",
            why="a fusion is refitted first and matched then, each once",
            how="pass some of [Refit(), Match()], in this order; [] leaves both out",
        )
    if steps and not calibrated:
        raise InputError(
            f"{kinds[0].__name__} needs calibration inputs",
            why="layers are fitted to the members' activations on them",
            how="pass calibration=..., 100 to 1,000 inputs without labels",
        )
    found = {type(step): step for step in steps}
    refit, match_ = found.get(Refit), found.get(Match)
    assert refit is None or isinstance(refit, Refit)
    assert match_ is None or isinstance(match_, Match)
    return refit, match_


def refitted(
    graph: CouplingGraph,
    plan: FusionPlan,
    states: Sequence[State],
    state: State,
    calibration: CalibrationBatches,
    options: Refit,
    task: Task | None,
) -> Start:
    """The fused network after a refit (`fxfuse.refine.refit` has the method).

    Raises:
        InputError: An activation is not a number.
    """
    new, report = refit_state(graph, plan, states, state, calibration, options, task)
    return Start(plan, new, report)


def matched_start(
    graph: CouplingGraph,
    plan: FusionPlan,
    states: Sequence[State],
    state: State,
    calibration: CalibrationBatches,
    refit: Refit | None,
    options: Match,
    task: Task | None,
    *,
    progress: bool | Progress = False,
) -> Start:
    """The refitted network or a member, whichever answers most like the ensemble, matched to it.

    A network that matching does not bring closer to the ensemble, on inputs that it holds out,
    keeps its tensors: a budget of a few steps can do more harm than good.

    Args:
        graph: The analysis of the members.
        plan: The plan of the fusion.
        states: The members' tensors by name.
        state: The fused tensors by name.
        calibration: A part of it fits, the rest chooses; matching sees all.
        refit: The refit before it, if any.
        options: The matching.
        task: What the output means.
        progress: Of the matching.

    Raises:
        InputError: An activation is not a number, or the inputs are no tensors.
    """
    kind = kind_of_network(graph.program, task)
    fitting, choosing = calibration.split(_HELD_OUT)
    fused = Start(plan, state)
    if refit is not None:
        fused = refitted(graph, plan, states, state, fitting, refit, task)
    members = [emit(graph.of_member(i).program, s) for i, s in enumerate(states)]
    answers = [_answers(member, choosing) for member in members]
    wanted = torch.stack(answers).mean(0)
    starts, far = dict[str, Start](), dict[str, float]()
    if not copies_of(graph, plan.sizes()) and not graph.members:
        # No member has the width that is asked for, where that is another one.
        starts = {f"member {i}": Start(_all_of(plan, i), s) for i, s in enumerate(states)}
        far = {name: distance(a, wanted, kind) for name, a in zip(starts, answers, strict=True)}
    starts["fused"] = fused
    network = emit_fused(graph, plan, fused.state)
    far["fused"] = distance(_answers(network, choosing), wanted, kind)
    name = min(far, key=lambda n: far[n])
    chosen = starts[name]
    # A start may be a member's own tensors, which stay as they are.
    module = emit_fused(graph, plan, {n: t.detach().clone() for n, t in chosen.state.items()})
    inputs = _joined(calibration)
    report = match(module, members, inputs, options, task=task, progress=progress)
    return Start(
        replace(chosen.plan, options={**plan.options, "start": name}),
        chosen.state,
        fused.refit,
        module,
        Choice(name, far, report.before, report.after, report.kept > 0),
        report,
    )


def _joined(calibration: CalibrationBatches) -> tuple[torch.Tensor, ...]:
    """All inputs of the calls, position by position."""
    if any(kwargs for _, kwargs in calibration.batches):
        raise InputError(
            "matching takes positional inputs only",
            where="calibration",
            why="it draws inputs one by one, by their position",
            how="wrap the networks in a module whose inputs are positional",
        )
    columns = zip(*(args for args, _ in calibration.batches), strict=True)
    return tuple(torch.cat(column) for column in columns)


def _answers(module: nn.Module, calibration: CalibrationBatches) -> torch.Tensor:
    """Outputs of a network in eval mode on all calibration inputs, float32 [n, *]."""
    with torch.no_grad():
        found = [logits_of(module(*args, **kwargs)).float() for args, kwargs in calibration.batches]
    return torch.cat(found)


def _all_of(plan: FusionPlan, member: int) -> FusionPlan:
    """The plan that takes every unit from one member."""
    maps = tuple(
        UnitMap(
            m.group,
            m.n_units,
            np.arange(m.n_units),
            np.full(m.n_units, member),
            np.arange(m.n_units),
        )
        for m in plan.maps
    )
    # It is that member, so nothing in it is averaged or another's.
    mixed = (RoleKind.AVERAGED, RoleKind.BASE)
    roles = {
        name: Role(RoleKind.MAPPED, absent_in=role.absent_in) if role.kind in mixed else role
        for name, role in plan.roles.items()
    }
    return replace(
        plan,
        maps=maps,
        roles=roles,
        constraints=replace(plan.constraints, base_member=member),
        mixing=Mixing(plan.mixing.mode),
    )
