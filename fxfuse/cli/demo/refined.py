"""Refined copies of the demo's networks; validation images choose where there is a choice."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fxfuse.cli.data import Batches
from fxfuse.cli.demo import measure
from fxfuse.refine import Match, RefineReport, default_optimizer, match

_LEARNING_RATES = (3e-3, 1e-2)


@dataclass(frozen=True)
class Refined:
    """A refined copy, the CPU seconds of all threads, and the learning rate, if chosen."""

    module: nn.Module
    seconds: float
    learning_rate: float | None = None


def timed(start: nn.Module, refine: Callable[[nn.Module], Any]) -> Refined:
    """Refine a copy of `start`."""
    module = copy.deepcopy(start)
    begin = time.process_time()
    refine(module)
    return Refined(module, time.process_time() - begin)


def matched(
    start: nn.Module,
    members: Sequence[nn.Module],
    images: Tensor,
    steps: int,
    seed: int,
) -> Refined:
    """Match a copy of `start` to the members on images `[n, 1, 28, 28]`, at the rate of `match`."""
    module = copy.deepcopy(start)
    report = match(module, members, images, Match(steps=steps, seed=seed), progress=False)
    return Refined(module, report.seconds)


def trained(
    start: nn.Module,
    refine: Callable[..., RefineReport],
    batches: Callable[[], Batches],
    steps: int,
    seed: int,
    validation: tuple[Tensor, Tensor],
) -> Refined:
    """Refine a copy of `start` with each learning rate, and return what validation prefers.

    `refine` is `fxfuse.refine.finetune` or a function like it; `batches` makes the batches anew, so
    that every run gets the same ones. `validation` is images `[n, 1, 28, 28]` and labels `[n]`.
    """
    candidates = []
    for learning_rate in _LEARNING_RATES:
        module = copy.deepcopy(start)
        optimizer, scheduler = default_optimizer(module, steps, learning_rate)
        begin = time.process_time()
        refine(
            module,
            batches(),
            steps=steps,
            optimizer=optimizer,
            scheduler=scheduler,
            progress=False,
            seed=seed,
        )
        candidates.append(Refined(module, time.process_time() - begin, learning_rate))
    return max(candidates, key=lambda candidate: merit(candidate.module, validation))


def merit(module: nn.Module, validation: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Return what networks are ranked by: validation accuracy, then low cross-entropy."""
    accuracy, cross_entropy = measure.evaluate(module, *validation)
    return accuracy, -cross_entropy
