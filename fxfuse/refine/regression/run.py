"""Closed-form, label-free refit: layer after layer, the student is regressed on the wide model."""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, inf, isfinite, prod
from statistics import median

import torch
from torch import fx

from fxfuse.activations import MEMORY, NodeRunner
from fxfuse.activations.calibration import FEW, CalibrationBatches, count_rows
from fxfuse.activations.recurrence import Recurrent, recurrent_of
from fxfuse.analysis.coupling import CouplingGraph
from fxfuse.analysis.heads import others_region
from fxfuse.common.options import Options
from fxfuse.errors import OptionError
from fxfuse.graph.torch_compat import hint
from fxfuse.planning.plan import FusionPlan
from fxfuse.refine.infer_task import infer_task, logits_of, task_of_head
from fxfuse.refine.regression.channel import (
    ROWS,
    PerChannel,
    channel_rows,
    fit_channels,
    per_channel_of,
    write_channels,
)
from fxfuse.refine.regression.closest import Closest, find_closest
from fxfuse.refine.regression.counterpart import counterparts
from fxfuse.refine.regression.error import Error
from fxfuse.refine.regression.fit_target import FitTarget, routes_of
from fxfuse.refine.regression.head import fit_head
from fxfuse.refine.regression.joint import joined, joint_pairs, parted
from fxfuse.refine.regression.place import Place
from fxfuse.refine.regression.recurrent import RecurrentFit
from fxfuse.refine.regression.rows import Sample, rows_for, sample
from fxfuse.refine.regression.sensitivity import Sensitivity
from fxfuse.refine.regression.solve import Fit, Ridge
from fxfuse.refine.regression.wanted import Aim, Wanted
from fxfuse.refine.regression.work import (
    NO_CLOSER,
    NO_LAYER,
    NO_TARGET,
    LayerFit,
    Work,
    inputs_of,
    left,
    node_of,
    read_in_members,
    tensors_of,
)
from fxfuse.refine.regression.write import State, current, write
from fxfuse.refine.targets import Targets
from fxfuse.refine.task import Classification, Task
from fxfuse.transform.resizing import Resized, resized_of

#: Inputs are taken until they have this many times the rows of each fit.
_SPREAD = 2
#: Bytes of the largest activation of one batch, and of all together, which a gradient needs; a
#: number of inputs that there are not.
_LARGEST, _TOGETHER, _ALL = 2**25, 2**28, 2**62
#: Above this ratio of errors outside and inside the fit there is a warning.
_APART = 3.0
#: Times that two layers of one sum are fitted in turn.
_TURNS = 2


@dataclass(frozen=True)
class RefitReport:
    """What a refit did.

    Attributes:
        layers: Every layer and normalisation that was looked at, in graph order; at another width
            than a member's, those first that are computed by other operators there.
        left: Parameters that no fit changed.
        seconds: CPU time.
        inputs: Number of calibration inputs.
        alpha: α of the regressions.
    """

    layers: tuple[LayerFit, ...]
    left: tuple[str, ...]
    seconds: float
    inputs: int
    alpha: float

    def __str__(self) -> str:
        """How many layers were fitted, and how much closer that brought them."""
        fits = [layer for layer in self.layers if layer.fitted]
        text = f"{len(fits)} of {len(self.layers)} layers fitted on {self.inputs:,} inputs"
        if not fits:
            return text
        before, after = median(f.before for f in fits), median(f.after for f in fits)
        text = f"{text}, median error from {before:.3g} to {after:.3g} of the variance"
        outside = [f.held_out for f in fits if isfinite(f.held_out)]
        return f"{text}, {median(outside):.3g} on rows left out" if outside else text

    @property
    def apart(self) -> float:
        """How many times as large the error is on rows left out of the fit; median over layers."""
        known = [f for f in self.layers if f.fitted and isfinite(f.held_out) and f.after > 0]
        return median(f.held_out / f.after for f in known) if known else 1.0


@dataclass(frozen=True)
class Refit(Options):
    """The closed-form, label-free refit of every layer to the members' activations.

    Attributes:
        alpha: Ridge of the regressions, relative to the mean square of a feature. None: 1e-3, or
            1e-2 with fewer than 100 inputs, and up to a hundred times as much for a layer that is
            closer to its target with it on rows left out of the fit.
        seed: Seed of the choice of rows of large layers.
        memory: Bytes of activations that stay in memory; the rest goes to a temporary folder.
    """

    alpha: float | None = None
    seed: int = 0
    memory: int = MEMORY

    def __post_init__(self) -> None:
        """Check the ridge and the memory."""
        super().__post_init__()
        if self.alpha is not None and not self.alpha > 0:
            raise OptionError(
                f"alpha must be above 0, got {self.alpha}",
                where="Refit(alpha=...)",
                how="pass a positive alpha, or leave it out",
            )
        if self.memory < 0:
            raise OptionError(
                f"memory must be at least 0, got {self.memory}",
                where="Refit(memory=...)",
                how="pass a number of bytes, or leave it out",
            )


def refit_state(
    graph: CouplingGraph,
    plan: FusionPlan,
    states: Sequence[Mapping[str, torch.Tensor]],
    state: Mapping[str, torch.Tensor],
    calibration: CalibrationBatches,
    options: Refit,
    task: Task | None = None,
) -> tuple[State, RefitReport]:
    """Refits every layer of a fused network to the members' merged activations.

    Args:
        graph: The analysis of the members.
        plan: The plan by which they were fused.
        states: The members' tensors by name.
        state: The fused tensors by name.
        calibration: Unlabelled inputs.
        options: How.
        task: What the output means: the head of a classifier is fitted to the ensemble's
            probabilities, of several heads each to its member's.

    Returns:
        New fused tensors, and the report.
    """
    graph.program.require_exported()
    return _Refit(graph, plan, states, state, calibration, options, task).run()


class _Refit:
    def __init__(
        self,
        graph: CouplingGraph,
        plan: FusionPlan,
        states: Sequence[Mapping[str, torch.Tensor]],
        state: Mapping[str, torch.Tensor],
        calibration: CalibrationBatches,
        options: Refit,
        task: Task | None,
    ) -> None:
        self.graph = graph
        self.options = options
        self.head_task = task_of_head(graph.program, task)
        self.task = task
        few = calibration.size < FEW
        self.alpha = options.alpha or (1e-2 if few else 1e-3)
        self.state: State = {name: tensor.detach() for name, tensor in state.items()}
        program = graph.program
        self.fits: list[LayerFit] = []
        routes: Sequence[FitTarget] = routes_of(program)
        taken = {route.norm.node for route in routes if route.norm is not None}
        operators: Sequence[PerChannel] = per_channel_of(program, taken)
        layers: Sequence[Recurrent] = recurrent_of(program)
        resized = resized_of(graph, plan)
        if resized is None:
            resized = Resized(program.graph, {}, {}, {}, {})
        else:
            routes, operators, layers, missing = counterparts(
                program, resized.nodes, routes, operators, layers
            )
            self.fits += [left(work, NO_LAYER) for work in missing]
        #: What the members compute at a node of the student's graph.
        told = {own: node for node, own in resized.nodes.items()}
        every: list[Work] = [*routes, *operators, *layers]
        self.work = {node_of(work): work for work in every}
        #: Layers that are fitted together: the first by the last of each pair.
        self.first_of: dict[fx.Node, FitTarget] = {
            last.layer.node: first
            for first, last in joint_pairs(routes)
            if not self.reason_to_leave(first) and not self.reason_to_leave(last)
        }
        self.postponed = {first.layer.node for first in self.first_of.values()}
        #: How many pieces of work still need a node's value.
        self.unread = Counter(read for work in self.work.values() for read in inputs_of(work))
        self.steps_read = Counter(read for work in layers for read in set(read_in_members(work)))
        enough, batch = self.inputs_needed()
        calibration = calibration.first(enough, batch)
        self.n_inputs, self.calibration = calibration.size, calibration.with_copies
        self.members = self.member_runners(states, set(self.steps_read), told)
        self.student = NodeRunner(
            program,
            self.state,
            self.calibration,
            name="the fused network",
            held=set(self.unread),
            graph=resized.graph,
            constants=resized.constants,
            memory=options.memory // 4 * 3,
        )
        self.targets = Targets(graph, plan, resized.layouts, told, resized.places)
        outputs = [resized.nodes.get(output, output) for output in program.outputs()]
        self.outputs = logits_of(outputs)
        if len(outputs) > 1:
            self.outputs = [n for n in self.outputs if len(n.meta["val"].shape) == 2]
        self.generator = torch.Generator().manual_seed(options.seed)
        self.changed: set[str] = set()
        self.wanted = self.what_is_wanted(states)

    def member_runners(
        self,
        states: Sequence[Mapping[str, torch.Tensor]],
        held: set[fx.Node],
        told: Mapping[fx.Node, fx.Node],
    ) -> list[NodeRunner]:
        """Make what runs each member, and holds what its recurrent layers read."""
        return [
            NodeRunner(
                self.graph.of_member(i).program,
                state,
                self.calibration,
                name=f"member {i}",
                held=held,
                asked_as=_asked_as(self.graph, told, i),
                absent=others_region(self.graph.program, i),
                memory=self.options.memory // (4 * len(states)),
            )
            for i, state in enumerate(states)
        ]

    def what_is_wanted(self, states: Sequence[Mapping[str, torch.Tensor]]) -> dict[Place, Aim]:
        """Run the members, and keep what all layers and normalisations should answer."""
        limits: dict[Place, int] = {}
        combine: dict[Place, Classification] = {}
        for work in self.work.values():
            if self.reason_to_leave(work):
                continue
            if isinstance(work, PerChannel):
                limits[place_of(work)] = ROWS
            elif isinstance(work, FitTarget):
                routes = [work] if work.partner is None else [work, work.partner]
                rows = rows_for(sum(map(self.features, routes)))
                for aimed in [a for route in routes for a in self.aims_of(route)]:
                    limits[place_of(aimed)] = max(rows, limits.get(place_of(aimed), 0))
                if self.is_head(work) and not self.graph.program.heads:
                    assert self.head_task is not None
                    combine[place_of(work)] = self.head_task
        if not limits:
            return {}
        options = self.options
        wanted = Wanted(
            self.members,
            self.targets,
            limits,
            combine,
            options.seed,
            options.memory // 4,
            self.sensitivity(),
        )
        return wanted.aims

    def aims_of(self, route: FitTarget) -> list[FitTarget]:
        """A route, and where it may not be gone back, the way to the layer's own output."""
        routes = [route] if route.partner is None else [route, route.partner]
        sure = not self.graph.program.heads and all(
            r.is_straight
            and self.targets.is_sure(r.aim)
            and self.targets.is_along(r.aim, r.layer.facts.channels)
            and r.skip is not None
            and list(r.skip.meta["val"].shape) == list(r.aim.meta["val"].shape)
            for r in routes
        )
        return [route] if sure else list(dict.fromkeys([route, route.alone()]))

    def sensitivity(self) -> Sensitivity | None:
        """What says how much the task depends on a row; None where one member alone cannot tell."""
        task, program = self.task, self.graph.program
        if task is None and len(program.outputs()) == 1:
            task, _ = infer_task(program)
        return None if task is None or program.heads else Sensitivity(task, self.options.seed)

    def inputs_needed(self) -> tuple[int, int]:
        """How many inputs have all rows that the fits look at, and how many are run at once."""
        needed, batch = float(FEW), max(count_rows(self.graph.program.example_inputs), 1)
        for work in self.work.values():
            if isinstance(work, Recurrent):
                return _ALL, _ALL
            place = place_of(work)
            shape = [hint(size) for size in place.node.meta["val"].shape]
            rows = prod(shape) / shape[place.channels if place.straight else -1] / batch
            wanted = ROWS if isinstance(work, PerChannel) else rows_for(self.features(work))
            needed = max(needed, _SPREAD * wanted / max(rows, 1))
        nodes = self.graph.program.graph.nodes
        values = (node.meta.get("val") for node in nodes if node.op != "get_attr")
        shapes = (x.shape for x in values if isinstance(x, torch.Tensor))
        sizes = [4 * prod(map(hint, shape)) / batch for shape in shapes]
        largest = max(sizes)
        at_a_time = min(_LARGEST / largest, _TOGETHER / sum(sizes))
        return ceil(needed), max(2, int(at_a_time))

    def features(self, route: FitTarget) -> int:
        """How many numbers one output of a layer is computed from."""
        return route.layer.matrix(route.layer.held(self.state)).shape[1]

    def run(self) -> tuple[State, RefitReport]:
        started = time.process_time()
        with torch.no_grad():
            for node in self.student.nodes:
                if node in self.work:
                    self.visit(self.work[node])
        program = self.graph.program
        parameters = {n for n, _ in program.module.named_parameters()}
        kept = tuple(n for n in program.names if n in parameters and n not in self.changed)
        for name in program.names:
            self.state[name] = self.state[program.canonical[name]]
        seconds = time.process_time() - started
        report = RefitReport(tuple(self.fits), kept, seconds, self.n_inputs, self.alpha)
        if report.apart > _APART:
            warnings.warn(
                f"layers are {report.apart:.1f} times as far off on inputs that the refit has not "
                f"seen as on its own {self.n_inputs}: pass more calibration inputs.",
                stacklevel=2,
            )
        return self.state, report

    def visit(self, work: Work) -> None:
        node = node_of(work)
        if node in self.postponed:
            return
        why = self.reason_to_leave(work)
        self.run_to(work, node, why)
        first = self.first_of.get(node)
        if why:
            self.fits.append(left(work, why))
        elif isinstance(work, Recurrent):
            self.fits += self.fit_recurrent(work)
        elif isinstance(work, PerChannel):
            self.fits.append(self.fit_channels(work))
        elif first is not None:
            self.fits += self.fit_together(first, work)
        else:
            self.fits.append(self.fit_layer(work))
            partner = work.partner
            if partner and self.fits[-1].fitted and not self.reason_to_leave(partner):
                self.fits[-1] = self.fit_in_turn(work, partner, self.fits[-1])
        for done in (first, work):
            if done is not None:
                self.let_go(done)

    def run_to(self, work: Work, node: fx.Node, why: str) -> None:
        """Run the fused network as far as a fit needs it: of what is replaced, no value is read."""
        if isinstance(work, Recurrent):
            for member in self.members:
                member.run_to(node)
        alone = isinstance(work, FitTarget) and work.partner is None and work.is_straight
        if alone or isinstance(work, PerChannel) or why:
            self.student.run_before(node)
        else:
            self.student.run_to(node)

    def reason_to_leave(self, work: Work) -> str:
        asked = sorted(n for n in tensors_of(work) if n in self.graph.asked)
        return f"an option asked for {asked[0]} to stay" if asked else ""

    def let_go(self, work: Work) -> None:
        for node in set(read_in_members(work)) if isinstance(work, Recurrent) else ():
            self.steps_read[node] -= 1
            if not self.steps_read[node]:
                for member in self.members:
                    member.drop(node)
        for read in inputs_of(work):
            self.unread[read] -= 1
            if not self.unread[read]:
                self.student.drop(read)

    # --- one layer ------------------------------------------------------------------------------

    def fit_layer(self, route: FitTarget) -> LayerFit:
        found = self.sample(route)
        if found is None and route.skip is not None:
            route = route.alone()
            found = self.sample(route)
        if found is None:
            return left(route, NO_TARGET)
        closest = self.closest(route, found, current(route, self.state), centred=route.has_shift)
        if closest.fit is None:
            return left(route, closest.why, closest.before, closest.held_out)
        self.write(route, closest.fit, found.rows, found.ratios)
        return closest.reported(route)

    def closest(self, route: FitTarget, found: Sample, held: Fit, *, centred: bool) -> Closest:
        """The best map that is found, if it is better than the one there was."""
        kept_out = found.held if bool(found.held.any()) else None
        ridge = Ridge(found.rows, centred=centred, weights=found.weights, held=kept_out)
        closest = find_closest(
            route.cut, found, held, ridge, self.alpha, chosen_by_user=bool(self.options.alpha)
        )
        if closest.fit is not None and self.is_head(route):
            combined = self.wanted[place_of(route)].combined
            logits = torch.cat(combined) if combined else found.aim(found.wanted)
            closest.fit = fit_head(found.rows, logits, closest.fit, closest.alpha)
        return closest

    def write(
        self, route: FitTarget, fit: Fit, rows: torch.Tensor, ratios: torch.Tensor | None
    ) -> None:
        write(route, self.state, fit, rows, ratios)
        self.changed |= tensors_of(route)
        self.student.redo(route.layer.node)

    def fit_together(self, first: FitTarget, last: FitTarget) -> list[LayerFit]:
        """Two layers whose outputs are added, by one regression on the inputs of both."""
        found = self.sample(last, beside=first)
        if found is None:
            return [self.fit_layer(first.alone()), self.fit_layer(last.alone())]
        held = joined(current(first, self.state), current(last, self.state))
        closest = self.closest(last, found, held, centred=first.has_shift or last.has_shift)
        if closest.fit is None:
            return [
                left(each, closest.why, closest.before, closest.held_out) for each in (first, last)
            ]
        features = self.features(first)
        parts = parted(closest.fit, features, shift_in_last=last.has_shift)
        self.write(first, parts[0], found.rows[..., :features], found.ratios)
        self.write(last, parts[1], found.rows[..., features:], found.ratios)
        self.again(first)
        return [closest.reported(first), closest.reported(last)]

    def fit_in_turn(self, last: FitTarget, first: FitTarget, fit: LayerFit) -> LayerFit:
        """Two layers whose outputs are added: each makes up for what the other leaves."""
        assert first.skip is not None
        for route in [first, last] * _TURNS:
            other = last if route is first else first
            self.again(other)
            self.student.run_to(first.skip)
            self.student.redo(route.layer.node)
            turn = self.fit_layer(route)
            if turn.fitted:
                fit = replace(fit, after=turn.after)
        self.again(last)
        return fit

    def again(self, route: FitTarget) -> None:
        """Computes anew what a layer adds to a sum."""
        way = [route.layer.node, *([route.norm.node] if route.norm else []), *route.chain]
        for node in way:
            self.student.redo(node)
        for node in way[:-1]:
            self.student.drop(node)

    def sample(self, route: FitTarget, beside: FitTarget | None = None) -> Sample | None:
        if beside is not None and not (route.is_straight and beside.is_straight):
            return None
        return sample(route, self.student, self.wanted[place_of(route)], beside)

    def is_head(self, route: FitTarget) -> bool:
        """Whether a layer writes the logits of a classifier."""
        if (
            self.head_task is None
            or route.norm is not None
            or route.layer.groups > 1
            or not any(route.aim is output for output in self.outputs)
        ):
            return False
        shape = route.aim.meta["val"].shape
        dim = self.head_task.dim % len(shape)
        return route.layer.facts.channels % len(shape) == dim and shape[dim] > 1

    def fit_recurrent(self, work: Recurrent) -> list[LayerFit]:
        fit = RecurrentFit(
            work,
            self.student,
            self.members,
            self.targets,
            self.state,
            self.alpha,
            self.generator,
        )
        found = fit.run()
        self.changed |= fit.changed
        self.student.redo(work.node)
        return found

    def fit_channels(self, op: PerChannel) -> LayerFit:
        found = channel_rows(op, self.student, self.wanted[place_of(op)])
        if found is None:
            return left(op, NO_TARGET)
        x, z = found.unscaled, found.wanted
        scale, shift = fit_channels(x, z)
        if not op.bias:
            scale, shift = (x * z).mean(0) / x.square().mean(0).clamp(min=1e-30), 0 * shift
        error_of = Error((-inf, inf), z)
        held = x * self.state[op.weight].float()
        if op.bias:
            held = held + self.state[op.bias].float()
        before, after = error_of(held), error_of(x * scale + shift)
        if not after < before:
            return left(op, NO_CLOSER, before)
        write_channels(op, self.state, found.inputs, scale, shift)
        self.changed |= tensors_of(op)
        self.student.redo(op.node)
        return LayerFit(op.weight, op.node.name, before, after, True)


def place_of(work: FitTarget | PerChannel) -> Place:
    """Where the values are that a piece of work aims at."""
    if isinstance(work, PerChannel):
        return Place(work.node, work.channels)
    return Place(work.aim, work.layer.facts.channels, work.is_straight)


def _asked_as(
    graph: CouplingGraph, told: Mapping[fx.Node, fx.Node], member: int
) -> Mapping[fx.Node, fx.Node]:
    """What a member computes in its own graph at a node of the student's."""
    if not graph.members:
        return told
    asked = told or {node: node for node in graph.program.graph.nodes}
    return {own: graph.node_of(node, member) for own, node in asked.items()}
