"""Fusion methods side by side, each as it is and after k steps, with the controls.

python -m benchmarks.paper.compare [--network vgg] [--setting specialists] [-n 2 4]
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

from torch import nn

from benchmarks.paper.experiment import Experiment, Job, Row
from benchmarks.paper.refining import both, controls, distilled, refitted, trained
from benchmarks.paper.runner import command
from fxfuse import Match
from fxfuse.refine import match, recalibrate

_ALIGNMENTS = {
    "average": "average",
    "weight matching": "weight_matching",
    "optimal transport": "optimal_transport",
    "zip": "zip",
}
_CALIBRATED = ("zip",)


def measure(job: Job) -> list[Row]:
    rows = [row for name, module in fusions(job) for row in both(job, name, module)]
    matching = f"{job.options.steps} matching steps"
    rows += both(job, f"auto, {matching} first", _auto(job))
    rows += controls(job)
    best = job.case.best
    rows += both(job, f"best member, {matching} first", _matched(job, best))
    for name, start in (("NT (obs) + refit", refitted(job)), ("best member", best)):
        rows.append(trained(job, f"{name}, distilled", distilled(job, start)))
    return rows


def fusions(job: Job) -> Iterator[tuple[str, nn.Module]]:
    """Networks that no step has been taken with."""
    for name, method in _ALIGNMENTS.items():
        calibration = job.calibration if method in _CALIBRATED else None
        module = job.fused(method=method, calibration=calibration)
        yield name, module
        renewed = copy.deepcopy(module)
        if recalibrate(renewed, job.calibration):
            yield f"{name} + recalibration", renewed
    yield "NT (l2)", job.fused()
    yield "NT (obs) + refit", refitted(job)


def _auto(job: Job) -> nn.Module:
    return job.fused(method="auto", calibration=job.calibration, steps=job.options.steps)


def _matched(job: Job, start: nn.Module) -> nn.Module:
    module = copy.deepcopy(start)
    match(module, job.case.members, job.calibration, Match(steps=job.options.steps, seed=job.seed))
    return module


_ABOUT = (
    "Every fused network has a member's width. *0 steps*: as fused; the next column: after k "
    "steps of fine-tuning on labels. Recalibration renews the running statistics of batch "
    "normalisation, so networks without any have no such line. `auto` and one control take "
    "k steps of label-free matching on the calibration inputs *before* that; distillation takes "
    "k steps on all training inputs without labels *instead* of it."
)

EXPERIMENT = Experiment(
    name="compare",
    title="Methods",
    about=_ABOUT,
    measure=measure,
    line="method",
    ns=(2, 4),
)

if __name__ == "__main__":
    command(EXPERIMENT)
