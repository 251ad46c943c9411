"""Refined copies of networks, and the controls that stand in every table.

Whatever is trained on labels is trained once with each of the same learning rates, and with others
beyond them as long as the last one is best; validation data chooses, and test data is asked about
the chosen one only.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from benchmarks.paper.experiment import Job, Row, along
from benchmarks.paper.setting import Size, accuracy
from fxfuse.refine import default_optimizer, distill, finetune, refit_head

TEMPERATURE = 2.0
AT_ONCE = "0 steps"


@dataclass(frozen=True)
class Refined:
    """The copy that validation chose.

    Attributes:
        module: The network.
        rate: Its learning rate.
        seconds: CPU seconds that training it took; the search is not counted.
    """

    module: nn.Module
    rate: float
    seconds: float


def merit(job: Job, module: nn.Module) -> tuple[float, float]:
    """What networks are ranked by: validation accuracy, then low cross-entropy."""
    inputs, labels = job.case.val
    with torch.no_grad():
        losses = [
            functional.cross_entropy(module(x), y, reduction="sum")
            for x, y in zip(inputs.split(500), labels.split(500), strict=True)
        ]
    return accuracy(module, inputs, labels), -float(torch.stack(losses).sum())


def chosen(job: Job, candidate: Callable[[float], nn.Module]) -> Refined:
    """Of what `candidate` makes with each learning rate, the best on validation data.

    A best rate at an end of the range may lie short of a better one: the range is widened there,
    until its end is not the best any more. A single rate is no range.
    """

    def tried(rate: float) -> Refined:
        start = time.process_time()
        module = candidate(rate)
        return Refined(module, rate, time.process_time() - start)

    def worth(refined: Refined) -> tuple[float, float]:
        return merit(job, refined.module)

    rates = sorted(job.options.rates)
    best = max(map(tried, rates), key=worth)
    beyond = job.options.beyond
    for end, factor in ((rates[-1], beyond), (rates[0], 1 / beyond)):
        while len(rates) > 1 and best.rate == end:
            end *= factor
            best = max(best, tried(end), key=worth)
    return best


def finetuned(job: Job, start: nn.Module, steps: int | None = None) -> Refined:
    """A copy of `start` after fine-tuning on labels."""
    return _trained(job, start, finetune, steps)


def distilled(job: Job, start: nn.Module) -> Refined:
    """A copy of `start` after distillation of the ensemble on the same inputs."""
    refine = functools.partial(_distill, list(job.case.members))
    return _trained(job, start, refine, None)


def _distill(members: list[nn.Module], module: nn.Module, batches: Any, **options: Any) -> None:
    distill(module, members, batches, temperature=TEMPERATURE, **options)


def _trained(job: Job, start: nn.Module, refine: Callable[..., Any], steps: int | None) -> Refined:
    taken = job.options.steps if steps is None else steps

    def candidate(rate: float) -> nn.Module:
        module = copy.deepcopy(start)
        optimizer, scheduler = default_optimizer(module, taken, rate)
        refine(
            module,
            job.batches(),
            steps=taken,
            optimizer=optimizer,
            scheduler=scheduler,
            progress=False,
            seed=job.seed,
        )
        return module

    return chosen(job, candidate)


def after(job: Job) -> str:
    """The column of what was trained."""
    return f"{job.options.steps} steps"


def raw(job: Job, row: str, module: nn.Module, x: float | None = None) -> Row:
    """A network as it is."""
    return Row(row, AT_ONCE, job.values(module), x)


def trained(job: Job, row: str, refined: Refined, x: float | None = None) -> Row:
    """A network after the k steps."""
    values = job.values(refined.module, rate=refined.rate, seconds=refined.seconds)
    return Row(row, after(job), values, x)


def both(job: Job, row: str, module: nn.Module, x: float | None = None) -> list[Row]:
    """A network as it is, and after k steps of fine-tuning."""
    return [raw(job, row, module, x), trained(job, row, finetuned(job, module), x)]


def refitted(job: Job) -> nn.Module:
    """Neuron Transplantation with the score and the refit that need calibration inputs."""
    return job.fused(score="obs", calibration=job.calibration, refit=True)


def transplants_and_controls(job: Job) -> list[Row]:
    """Neuron Transplantation by itself and with the refit, and the controls."""
    return [
        *both(job, "NT (l2)", job.fused()),
        *both(job, "NT (obs) + refit", refitted(job)),
        *controls(job),
    ]


def swept(job: Job, sizes: Mapping[float, Size]) -> list[Row]:
    """`transplants_and_controls` for members of several sizes, a line of the table for each.

    Args:
        job: The repetition.
        sizes: Place along the table's line → size of the members.
    """
    rows = []
    for x, size in sizes.items():
        sized = dataclasses.replace(job, size=size)
        rows += along(f"{x:g}", x, transplants_and_controls(sized))
    return rows


def controls(job: Job) -> list[Row]:
    """The member that validates best, also with its head refitted, and the ensemble.

    Members are as they are and after the same steps.
    """
    new_head = copy.deepcopy(job.case.best)
    refit_head(new_head, job.case.members, job.calibration, layer="head")
    return [
        *both(job, "best member", job.case.best),
        *both(job, "best member, head refit", new_head),
        raw(job, "ensemble", job.case.ensemble),
    ]
