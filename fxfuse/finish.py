"""What follows the transplant: refit, the choice of a start, matching to the ensemble."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from fxfuse.calibration import Calibration
from fxfuse.coupling import CouplingGraph
from fxfuse.errors import RefineError
from fxfuse.plan import FusionPlan, UnitMap
from fxfuse.refine.batch import logits_of
from fxfuse.refine.match import MatchReport, match
from fxfuse.refine.outputs import kind_of
from fxfuse.refine.regression import RefitReport, Settings, refit_state
from fxfuse.rewrite import emit

#: Share of the calibration inputs that choose the start; the refit does not see them.
_HELD_OUT = 0.25

State = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Choice:
    """Which network the matching started from.

    Attributes:
        start: `fused` or `member <i>`.
        divergence: For each start, how far its outputs are from the ensemble's on calibration
            inputs that no fit has seen: KL divergence in nats for class logits, else the mean
            squared difference relative to the outputs' variance.
        after: The same for the network that is handed over.
        kept: Whether the matching was kept; it is not where it did not bring the start closer.
    """

    start: str
    divergence: Mapping[str, float]
    after: float
    kept: bool = True

    def __str__(self) -> str:
        """What was chosen and why."""
        each = ", ".join(f"{name} {value:.3g}" for name, value in self.divergence.items())
        end = f"{self.after:.3g} after matching" if self.kept else "which matching did not improve"
        return (
            f"started from {self.start}, closest to the ensemble on held-out inputs ({each}); {end}"
        )


@dataclass(frozen=True)
class Start:
    """A network to go on from.

    Attributes:
        plan: Which unit of which member went where.
        state: Its tensors by name.
        refit: What the refit did, if this is a refitted network.
        choice: What was chosen from.
    """

    plan: FusionPlan
    state: State
    refit: RefitReport | None = None
    choice: Choice | None = None


def refitted(
    graph: CouplingGraph,
    plan: FusionPlan,
    states: Sequence[State],
    state: State,
    calibration: Calibration,
    outputs: str | None,
) -> Start:
    """The fused network after a refit (`fxfuse.refine.refit` has the method).

    Raises:
        CalibrationError: An activation is not a number.
    """
    settings = Settings(logits=_kind(graph, outputs) == "logits")
    new, report = refit_state(graph, plan, states, state, calibration, settings)
    return Start(plan, new, report)


def best_start(
    graph: CouplingGraph,
    plan: FusionPlan,
    states: Sequence[State],
    state: State,
    calibration: Calibration,
    outputs: str | None,
) -> Start:
    """The refitted network or a member, whichever answers most like the ensemble.

    Args:
        graph: The analysis of the members.
        plan: The plan of the fusion.
        states: The members' tensors by name.
        state: The fused tensors by name.
        calibration: A part of it fits, the rest chooses.
        outputs: `logits`, `values`, or None to let the outputs' shape decide.

    Raises:
        CalibrationError: An activation is not a number.
    """
    kind = _kind(graph, outputs)
    fitting, choosing = calibration.split(_HELD_OUT)
    fused = refitted(graph, plan, states, state, fitting, outputs)
    answers = [_answers(graph, s, choosing) for s in states]
    wanted = torch.stack(answers).mean(0)
    starts = {f"member {i}": Start(_all_of(plan, i), s) for i, s in enumerate(states)}
    starts["fused"] = fused
    far = {f"member {i}": _divergence(a, wanted, kind) for i, a in enumerate(answers)}
    far["fused"] = _divergence(_answers(graph, fused.state, choosing), wanted, kind)
    name = min(far, key=lambda n: far[n])
    chosen = starts[name]
    plan = replace(chosen.plan, method="auto", options={**plan.options, "start": name})
    return replace(chosen, plan=plan, refit=fused.refit, choice=Choice(name, far, far[name]))


def matched(
    module: nn.Module,
    graph: CouplingGraph,
    states: Sequence[State],
    start: Start,
    calibration: Calibration,
    *,
    outputs: str | None,
    steps: int | None,
    seconds: float | None,
) -> tuple[Choice | None, MatchReport]:
    """Matches a network in place to the mean of the members' outputs on the calibration inputs.

    A network that this does not bring closer to the ensemble gets the start's tensors back: a
    budget of a few steps can do more harm than good.

    Raises:
        RefineError: The inputs are no tensors, or a budget is not positive.
    """
    members = [emit(graph.captured, state) for state in states]
    calls = calibration.batches
    if any(kwargs for _, kwargs in calls):
        raise RefineError(
            "matching takes positional inputs only",
            where="calibration",
            why="its pool is indexed input by input",
            how="wrap the networks in a module whose inputs are positional",
        )
    inputs = tuple(torch.cat(column) for column in zip(*(args for args, _ in calls), strict=True))
    report = match(module, members, inputs, outputs=outputs, steps=steps, seconds=seconds)
    if start.choice is None:
        return None, report
    kind, (_, choosing) = _kind(graph, outputs), calibration.split(_HELD_OUT)
    wanted = torch.stack([_answers(graph, state, choosing) for state in states]).mean(0)
    after = _divergence(_answers(graph, module.state_dict(), choosing), wanted, kind)
    before = start.choice.divergence[start.choice.start]
    if after < before:
        return replace(start.choice, after=after), report
    module.load_state_dict(start.state)
    return replace(start.choice, after=before, kept=False), report


def _kind(graph: CouplingGraph, outputs: str | None) -> str:
    shapes = [n.meta["val"].shape for n in graph.captured.outputs() if isinstance(n, torch.fx.Node)]
    return kind_of(shapes[0], outputs)


def _answers(graph: CouplingGraph, state: State, calibration: Calibration) -> torch.Tensor:
    """Outputs of a network on all calibration inputs, float32 [n, *]."""
    module = emit(graph.captured, state)
    with torch.no_grad():
        found = [logits_of(module(*args, **kwargs)).float() for args, kwargs in calibration.batches]
    return torch.cat(found)


def _divergence(answers: torch.Tensor, wanted: torch.Tensor, kind: str) -> float:
    if kind == "logits":
        target, log = wanted.log_softmax(1), answers.log_softmax(1)
        return float((target.exp() * (target - log)).sum(1).mean())
    variance = wanted.var(0, correction=0).mean().clamp(min=1e-30)
    return float((answers - wanted).square().mean() / variance)


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
    return replace(plan, host=member, maps=maps, averaged={}, hosted=(), notes=())
