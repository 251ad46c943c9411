"""The way after the transplant: starts, refit, matching; the judge accepts or rejects each step.

calibration inputs → fit, choose, accept. Each candidate is made on the first, compared on the
second, and taken only if it is better than what there was on the third.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch

from fxfuse.activations.augment import Augment
from fxfuse.activations.calibration import FEW, CalibrationBatches
from fxfuse.analysis.coupling import CouplingGraph
from fxfuse.errors import InputError, OptionError, RefineError
from fxfuse.planning.plan import FusionPlan
from fxfuse.refine.history import OTHER, Candidate, History
from fxfuse.refine.infer_task import task_of_all
from fxfuse.refine.judge import (
    Asked,
    Judge,
    Measured,
    Stopwatch,
    Verdict,
    ask,
    ask_members,
    check_task,
    compare,
    copied,
    divided,
    folds,
)
from fxfuse.refine.match import Match, MatchReport, TooFewSeconds, augment_of, train
from fxfuse.refine.regression import Refit, RefitReport, refit_state
from fxfuse.refine.regression.transfer import Moved, Student, draw_levels, fit_answer
from fxfuse.refine.starts import (
    Start,
    State,
    exact_starts,
    fused_start,
    grown_start,
    members_of,
    whole_width,
)
from fxfuse.refine.task import Classification, Task
from fxfuse.transform.emit import FusedModule

if TYPE_CHECKING:
    from rich.progress import Progress

#: Parts of few inputs, each of which judges what was made on the others.
_FOLDS = 4


@dataclass(frozen=True)
class Steps:
    """What follows a fusion, as it was asked for.

    Attributes:
        refit: The refit, if any.
        match: The matching, if any.
        task: What the output means; None: what the graph says.
        progress: Of the matching.
    """

    refit: Refit | None = None
    match: Match | None = None
    task: Task | None = None
    progress: bool | Progress = False

    def __bool__(self) -> bool:
        """Whether anything follows."""
        return self.refit is not None or self.match is not None


@dataclass(frozen=True)
class Refined:
    """The network that the way leads to.

    Attributes:
        plan: Which unit of which member went where.
        module: The network.
        refit: What the refit did, if there was one.
        match: What the matching did, if there was one.
        history: Every candidate, and what became of it; None where nothing could be judged.
        members: The members that the plan is for, by their places among those that are fused;
            None: all of them.
        moved: What was moved from members of other architectures, where there are any.
    """

    plan: FusionPlan
    module: FusedModule
    refit: RefitReport | None = None
    match: MatchReport | None = None
    history: History | None = None
    members: tuple[int, ...] | None = None
    moved: Moved | None = None


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


class Plans(Protocol):
    """What plans a fusion, from the inputs that a fit may see."""

    @property
    def graph(self) -> CouplingGraph:
        """The analysis of the members."""

    @property
    def ensemble(self) -> Any:
        """The members, with their tensors by name as `states`.

        `others` are the members of other architectures, `numbers` are those of the first ones;
        `architectures` has a program of each.
        """

    def plan(self, batches: CalibrationBatches | None) -> FusionPlan:
        """Plan the fusion; the method may look at these inputs."""

    @property
    def outline(self) -> FusionPlan | None:
        """The plan without a look at any input: sizes and roles; None where that cannot be."""

    @property
    def uniform(self) -> Plans | None:
        """What plans all groups equally wide, where widths are chosen group by group."""

    def state(self, plan: FusionPlan) -> State:
        """The fused tensors of a plan, by name."""


def refined(
    plans: Plans, calibration: CalibrationBatches, steps: Steps, *, judged: bool
) -> Refined:
    """Fuse, refit, match to the ensemble, and return the best network on the way.

    Args:
        plans: Plans the fusion.
        calibration: The calibration inputs.
        steps: What is to be done.
        judged: Whether there is an ensemble to compare with.

    Raises:
        InputError: An activation is not a number.
        OptionError: The task does not fit the outputs.
    """
    if not judged or (calibration.held_out == 0 and calibration.evaluate is None):
        return _unjudged(plans, calibration, steps)
    return _Way(plans, calibration, steps).run()


def _unjudged(plans: Plans, calibration: CalibrationBatches, steps: Steps) -> Refined:
    """What was asked for, whatever comes of it."""
    graph, states = plans.graph, plans.ensemble.states
    plan = plans.plan(calibration)
    state, report, match = plans.state(plan), None, None
    if steps.refit is not None:
        state, report = refit_state(
            graph, plan, states, state, calibration, steps.refit, steps.task
        )
    others, moved = plans.ensemble.others, None
    if steps.match is None and not others:
        return Refined(plan, fused_start(graph, plan, state, "fused").module, report)
    members = members_of(graph, states, others)
    task = steps.task or task_of_all(plans.ensemble.architectures)[0]
    check_task(task, members, calibration)
    asked = ask_members(task, members, calibration)
    if others and steps.refit is not None:
        student = Student(graph, plan, state)
        moved = Moved(fit_answer(student, _plain(asked), task), (), kept=True)
        state = student.state
    start = fused_start(graph, plan, state, "fused")
    if steps.match is not None:
        judge = Judge(task.prepared(asked.wanted, asked.members), asked)
        match = train(
            start.module, members, calibration, judge, steps.match, progress=steps.progress
        )
    return Refined(plan, start.module, report, match, moved=moved)


#: What refit and matching make, in the order in which the judge looks at it. A member that was
#: matched comes first: what is fitted more has to be better than what is fitted less.
#: What is moved from members of other architectures has to be better than the best start first.
_KINDS = ("moved", "matched", "fitted", "fitted and matched")
#: What the name of a network says of widths that were chosen group by group.
_BY_GROUP = ", widths by group"
#: By so much, as a share, a member with units of others may be farther off than the member itself.
_AS_GOOD = 0.01
#: A member is near the ensemble at this KL divergence in nats, and how many times as close a fused
#: network has to be to take its place then.
_NEAR, _CLEAR = 0.02, 1.5


@dataclass
class _Made:
    """Networks that were made on some of the inputs.

    Attributes:
        starts: Members, alone and side by side: nothing was fitted.
        best: The one of them that is closest to the ensemble on the inputs that choose.
        steps: What refit and matching made, by kind.
        refit: What the refit did.
        matched: What each matching did, by the name of what it led to.
        moved: What was moved from members of other architectures, by the name of what it led to.
        notes: What came of a step that led to nothing.
        chosen_by: Of each network, what it is worth on the inputs that choose.
        seconds: CPU seconds of each.
    """

    starts: list[Start] = field(default_factory=list)
    best: Start | None = None
    steps: dict[str, Start] = field(default_factory=dict)
    refit: RefitReport | None = None
    matched: dict[str, MatchReport] = field(default_factory=dict)
    moved: dict[str, Moved] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    chosen_by: dict[str, Measured] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def after(self, kind: str) -> Start | None:
        """The network of a kind, or what there was before where nothing better came of it."""
        if kind in self.steps:
            return self.steps[kind]
        return self.steps.get("fitted") if kind == "fitted and matched" else self.best

    def cost(self, start: Start) -> float:
        """What is compared on the inputs that choose; smaller is better."""
        return self.chosen_by[start.name].cost


class _Way:
    def __init__(self, plans: Plans, calibration: CalibrationBatches, steps: Steps) -> None:
        self.plans, self.graph, self.states = plans, plans.graph, plans.ensemble.states
        self.calibration, self.steps = calibration, steps
        graph, states = self.graph, self.states
        self.others, self.numbers = plans.ensemble.others, plans.ensemble.numbers
        self.members = members_of(graph, states, self.others)
        self.task, self.why = (
            task_of_all(plans.ensemble.architectures)
            if steps.task is None
            else (steps.task, "it was given")
        )
        check_task(self.task, self.members, calibration)
        self.metric = calibration.evaluate
        if self.metric is not None:
            ask(self.metric, self.members[0])
        elif len(calibration.parts(2)) < 2:
            raise InputError(
                f"{calibration.size} calibration inputs are too few to judge by some of them",
                where="calibration inputs",
                why=f"at least {2 * max(2, calibration.unit)} are needed",
                how="pass 100 to 1,000, or Calibration(inputs, held_out=0), which judges nothing",
            )
        #: Makes copies of the inputs that judge, where matching learns from copies, too.
        self.augment: Augment | None = None
        if steps.match is not None and self.metric is None:
            self.augment = augment_of(steps.match, calibration)
        #: How often the way is gone: of a budget in seconds each has a part.
        self.runs = 1

    def run(self) -> Refined:
        """Make the networks, and take the last one that the judge accepts."""
        watch = Stopwatch()
        share = self.calibration.held_out
        fitting, choosing, accepting = divided(self.calibration, share)
        apart = fitting.size + choosing.size + accepting.size <= self.calibration.size
        few = self.metric is None and (self.calibration.size < FEW or not apart)
        judged: dict[str, Measured] = {}
        if few:
            fitting, choosing = self.calibration.split(share)
            parts = folds(self.calibration, _FOLDS)
            self.runs = 1 + len(parts)
            # The copies are those of the parts, so that all networks are compared on the same.
            copies = [own for _, part in parts if (own := copied(part, self.augment))]
            whole = copies[0].together(*copies[1:]) if copies else None
            accept = self._judge(self.calibration, whole)
            judged = self._cross_fitted(parts, accept.task)
        else:
            accept = self._judge(accepting, copied(accepting, self.augment))
        choose = self._judge(choosing, copied(choosing, self.augment))
        asking = watch.lap()
        made = self._make(fitting, choose)
        for start in made.starts:
            judged[start.name] = accept.measure(start.module)
        for kind, start in made.steps.items():
            judged[start.name] = judged[kind] if few else accept.measure(start.module)
        return self._accepted(made, judged, asking, choose, accept)

    def _judge(self, inputs: CalibrationBatches, copies: CalibrationBatches | None) -> Judge:
        asked = ask_members(self.task, self.members, inputs, copies)
        return Judge(self.task.prepared(asked.wanted, asked.members), asked, self.metric)

    def _cross_fitted(
        self, parts: Sequence[tuple[CalibrationBatches, CalibrationBatches]], task: Task
    ) -> dict[str, Measured]:
        """What each kind of step is worth on inputs that it has not seen.

        Each part of the inputs judges the networks that were made on all others (Stone, 1974,
        "Cross-validatory choice and assessment of statistical predictions"). It is the steps that
        are judged, by their role: another member may be the best one on other inputs. `task` is
        that of all inputs, so that distances on the parts have one scale.
        """
        found: dict[str, list[torch.Tensor]] = {kind: [] for kind in _KINDS}
        for others, part in parts:
            fitting, choosing = others.split(self.calibration.held_out)
            made = self._make(fitting, self._judge(choosing, copied(choosing, self.augment)))
            asked = ask_members(task, self.members, part, copied(part, self.augment))
            judge = Judge(task, asked, self.metric)
            for kind in _KINDS:
                start = made.after(kind)
                if start is not None:
                    found[kind].append(judge.measure(start.module).each)
        return {kind: Measured(torch.cat(each)) for kind, each in found.items() if each}

    def _make(self, fitting: CalibrationBatches, choose: Judge) -> _Made:
        """Make all networks; what is fitted sees `fitting` only."""
        made, watch = _Made(), Stopwatch()

        def measure(start: Start) -> Start:
            made.chosen_by[start.name] = choose.measure(start.module)
            made.seconds[start.name] = watch.lap()
            return start

        # Members fit into equally wide groups. Where there is no plan without a look at inputs, the
        # plan of the fit says the sizes, too.
        even = self.plans.uniform or self.plans
        planned = None if even.outline else even.plan(fitting)
        plan = planned or even.outline
        assert plan is not None
        known, far = None, dict[str, float]()
        has_starts = whole_width(self.graph, plan) >= 1
        if has_starts or self.steps.match is not None:
            known = ask_members(self.task, self.members, fitting)
        if has_starts and known is not None:
            wide = Judge(choose.task, known.and_also(choose.asked))
            for start, far[start.name] in exact_starts(
                self.graph, plan, self.states, wide, self.numbers
            ):
                made.starts.append(measure(start))
        by_metric = self.metric is not None
        best = made.best = min(
            made.starts, key=made.cost if by_metric else lambda s: far[s.name], default=None
        )
        move = _Move(self, made, known or fitting, choose)
        fitted = None
        # A member alone in its architecture has nobody to be fused with.
        alone = bool(self.others) and len(self.states) == 1
        if best is None or (self.steps.refit is not None and not alone):
            plan = planned or even.plan(fitting)
            fitted = self._fitted(made, plan, fitting, measure)
            moved = move.into(fitted)
            fitted = made.steps["fitted"] = fitted if moved is fitted else measure(moved)
        # A network that is farther off than a member is not worth the steps.
        worth = fitted is not None and (best is None or made.cost(fitted) < made.cost(best))
        starts: dict[str, Start] = {}
        if best is not None:
            start = self._grown(made, plan, best, measure)
            moved = move.into(start, f"{start.name} refitted")
            if moved is not start:
                start = made.steps["moved"] = measure(moved)
            starts["matched"] = start
        if fitted is not None and worth:
            starts["fitted and matched"] = fitted
        shares = _shares([made.cost(start) for start in starts.values()])
        for (kind, start), share in zip(starts.items(), shares, strict=True):
            self._match(made, kind, start, known, choose, share, measure)
        if fitted is not None and not worth and self.steps.match is not None:
            assert best is not None
            made.notes[f"matched from {fitted.name}"] = f"left out: {best.name} is closer"
        return made

    def _grown(
        self, made: _Made, plan: FusionPlan, best: Start, measure: Callable[[Start], Start]
    ) -> Start:
        """The best start, or where that is one member, as good a one that fills the wanted size."""
        grown = None
        if best.member is not None and self.steps.match is not None:
            grown = grown_start(self.graph, plan, self.states, best.member, self.numbers)
        if grown is None:
            return best
        made.starts.append(measure(grown))
        far, near = made.cost(grown), made.cost(best)
        return grown if far <= near + _AS_GOOD * abs(near) else best

    def _fitted(
        self,
        made: _Made,
        plan: FusionPlan,
        fitting: CalibrationBatches,
        measure: Callable[[Start], Start],
    ) -> Start:
        """The fused network, refitted where that is asked for.

        Widths that were chosen group by group are taken only if they are closer than equal ones on
        the inputs that choose, beyond the uncertainty of the comparison.
        """
        start, made.refit = self._refitted(plan, fitting, "")
        even = measure(start)
        by_group = plan if self.plans.uniform is None else self.plans.plan(fitting)
        if by_group.sizes() == plan.sizes():
            return even
        start, report = self._refitted(by_group, fitting, _BY_GROUP)
        spread = measure(start)
        if compare(made.chosen_by[spread.name], made.chosen_by[even.name]).better:
            made.refit = report
            made.notes[even.name] = f"left out: {spread.name} is closer"
            return spread
        made.notes[spread.name] = f"left out: not closer than {even.name} beyond chance"
        return even

    def _refitted(
        self, plan: FusionPlan, fitting: CalibrationBatches, widths: str
    ) -> tuple[Start, RefitReport | None]:
        state = self.plans.state(plan)
        if self.steps.refit is None:
            return fused_start(self.graph, plan, state, f"fused{widths}"), None
        state, report = refit_state(
            self.graph, plan, self.states, state, fitting, self.steps.refit, self.task
        )
        return fused_start(self.graph, plan, state, f"refitted{widths}"), report

    def _match(
        self,
        made: _Made,
        kind: str,
        start: Start,
        known: Asked | None,
        choose: Judge,
        share: float,
        measure: Callable[[Start], Start],
    ) -> None:
        """Match a copy of a network; of a budget in seconds it has a share."""
        options = self.steps.match
        if options is None or known is None:
            return
        if options.seconds is not None:
            options = replace(options, seconds=options.seconds * share / self.runs)
        name, module = f"matched from {start.name}", copy.deepcopy(start.module)
        try:
            report = train(
                module,
                self.members,
                known.calibration,
                choose,
                options,
                progress=self.steps.progress,
                known=known,
            )
        except (RefineError, TooFewSeconds) as error:
            made.notes[name] = f"left out: {error.what}"
            return
        made.matched[name] = report
        if report.kept:
            made.steps[kind] = measure(replace(start, name=name, module=module))
        else:
            made.notes[name] = "rejected: no state on the way was closer"

    def _accepted(
        self,
        made: _Made,
        judged: dict[str, Measured],
        asking: float,
        choose: Judge,
        accept: Judge,
    ) -> Refined:
        """The best start, or the last step that is better than what there was."""
        lines: list[Candidate] = []
        current, is_member = made.best, True
        for start in made.starts:
            said = "the best start" if start is current else "a start"
            lines.append(_line(start, made, judged, said))
        for kind in (kind for kind in _KINDS if kind in made.steps):
            start = made.steps[kind]
            if current is None:
                current, is_member = start, False
                lines.append(_line(start, made, judged, "the only start at this size"))
                continue
            verdict = compare(judged[start.name], judged[current.name])
            line = _line(start, made, judged, "")
            line.low, line.high, line.gain = verdict.low, verdict.high, verdict.gain
            line.against = current.name
            displaced = is_member and kind != "matched"
            clear = not displaced or self._is_clear(judged[start.name], judged[current.name])
            line.accepted = verdict.better and clear
            line.verdict = _said(verdict, clear=clear)
            lines.append(line)
            if line.accepted:
                current, is_member = start, kind == "matched"
        for name, note in made.notes.items():
            cost = made.chosen_by[name].cost if name in made.chosen_by else float("nan")
            seconds = made.seconds.get(name, 0.0)
            lines.append(Candidate(name, cost, verdict=note, seconds=seconds))
        lines += [
            Candidate(
                f"member {number}",
                choose.measured(choose.asked.members[number], self.members[number]).cost,
                accept.measured(accept.asked.members[number], self.members[number]).cost,
                verdict=OTHER,
            )
            for number in self.others
        ]
        assert current is not None
        history = History(
            tuple(lines),
            current.name,
            self._unit(),
            str(self.task),
            self.why,
            asking,
            next(iter(judged.values())).each.numel(),
        )
        origin = current.name.removeprefix("matched from ")
        plan = replace(current.plan, options={**current.plan.options, "start": origin})
        match = made.matched.get(current.name) or next(iter(made.matched.values()), None)
        moved = made.moved.get(origin)
        if moved is None and made.moved:
            # What was tried is told, though it is not in this network.
            moved = replace(next(iter(made.moved.values())), kept=False)
        return Refined(plan, current.module, made.refit, match, history, current.members, moved)

    def _is_clear(self, new: Measured, member: Measured) -> bool:
        """Whether a fused network may take a member's place.

        A member knows more than unlabelled inputs show. If it is near the ensemble, there is little
        to win, so that a fused classifier has to be much closer. Labels and a metric say themselves
        who knows more.
        """
        known = self.metric is not None or bool(self.calibration.labels)
        if known or not isinstance(self.task, Classification) or member.mean > _NEAR:
            return True
        return _CLEAR * new.mean <= member.mean

    def _unit(self) -> str:
        """What the judge's numbers are."""
        if self.metric is not None:
            return "minus your own metric"
        return "loss on the labels" if self.calibration.labels else self.task.unit


def _shares(costs: Sequence[float]) -> list[float]:
    """What each network has of a budget: the closer it is to the ensemble, the more.

    A user's own metric may have any scale and sign; then all have the same.
    """
    if not all(cost > 0 for cost in costs):
        return [1 / len(costs)] * len(costs)
    worth = [1 / cost for cost in costs]
    return [own / sum(worth) for own in worth]


def _plain(asked: Asked) -> Asked:
    """The inputs without copies: of these the members would have to be asked anew."""
    return replace(asked, calibration=replace(asked.calibration, augmentations=0))


class _Move:
    """Moves what can be moved from members of other architectures, in closed form.

    What comes of it is taken where it is closer to the ensemble on the inputs that choose.
    """

    def __init__(
        self, way: _Way, made: _Made, given: Asked | CalibrationBatches, choose: Judge
    ) -> None:
        self.way, self.made, self.choose = way, made, choose
        self.wanted = bool(way.others) and way.steps.refit is not None
        if self.wanted:
            if isinstance(given, CalibrationBatches):
                given = ask_members(way.task, way.members, given)
            self.asked = _plain(given)

    def into(self, start: Start, name: str | None = None) -> Start:
        """The network with what was moved into it, as `name`; itself where nothing is closer."""
        if not self.wanted or start.members is not None:
            return start
        best, least = start, self.choose.measure(start.module).cost
        name = name or start.name
        for levels in (False, True):
            moved, student = self._moved(start, levels=levels)
            found = fused_start(self.way.graph, start.plan, student.state, name)
            cost = self.choose.measure(found.module).cost
            self.made.moved.setdefault(name, moved)
            if cost < least:
                best, least, self.made.moved[name] = found, cost, replace(moved, kept=True)
        if best is start and name != start.name:
            self.made.notes[name] = f"left out: {start.name} is closer"
        return best

    def _moved(self, start: Start, *, levels: bool) -> tuple[Moved, Student]:
        way = self.way
        student = Student(way.graph, start.plan, start.module.state_dict())
        drawn = draw_levels(student, way.others, self.asked, way.task) if levels else []
        return Moved(fit_answer(student, self.asked, way.task), tuple(drawn)), student


def _said(verdict: Verdict, *, clear: bool) -> str:
    """What the history says of a network that was compared with the one there was."""
    if verdict.better:
        return "accepted" if clear else f"rejected: not {_CLEAR:g} times as close as a near member"
    worse = verdict.high < 0
    return "rejected: worse" if worse else "rejected: no improvement beyond chance"


def _line(start: Start, made: _Made, judged: dict[str, Measured], verdict: str) -> Candidate:
    return Candidate(
        start.name,
        made.chosen_by[start.name].cost,
        judged[start.name].cost if start.name in judged else float("nan"),
        seconds=made.seconds[start.name],
        verdict=verdict,
    )
