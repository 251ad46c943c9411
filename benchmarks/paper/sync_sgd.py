"""Workers that train in parallel and exchange what they have learnt every few steps.

python -m benchmarks.paper.sync_sgd
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Callable

import torch
from torch import nn

from benchmarks.paper.experiment import Experiment, Job, Row
from benchmarks.paper.refining import after, chosen, controls, merit
from benchmarks.paper.runner import command
from benchmarks.paper.setting import seen
from fxfuse.cli.data import Batches
from fxfuse.cli.evaluate import Ensemble
from fxfuse.refine import finetune

#: Into how many parts the k steps are cut, with an exchange between them.
PARTS = (2, 8)
_METHODS = {"transplantation": "transplant", "averaging": "average"}
_STARTS = {"one start": False, "own starts": True}


def measure(job: Job) -> list[Row]:
    rows = []
    for start, own in _STARTS.items():
        for parts in PARTS:
            every = job.options.steps // parts
            for name, method in _METHODS.items():
                workers = functools.partial(_workers, job, own, parts, method)
                rows.append(_best(job, f"{every}", f"{name}, {start}", workers, float(every)))
        alone = functools.partial(_workers, job, own, 1, None)
        rows.append(_best(job, f"no exchange, {start}", after(job), alone))
    # Workers from one start hardly differ, so only the other ones make an ensemble.
    together = chosen(job, lambda rate: Ensemble(_workers(job, True, 1, None, rate)).eval())
    rows.append(Row("ensemble of workers, own starts", after(job), job.values(together.module)))
    return rows + controls(job)


def _best(
    job: Job,
    row: str,
    column: str,
    workers: Callable[[float], list[nn.Module]],
    x: float | None = None,
) -> Row:
    """The worker that validates best, at the rate that validates best."""
    refined = chosen(job, lambda rate: max(workers(rate), key=functools.partial(merit, job)))
    values = job.values(refined.module, rate=refined.rate, seconds=refined.seconds)
    return Row(row, column, values, x)


def _workers(
    job: Job, own_starts: bool, parts: int, method: str | None, rate: float
) -> list[nn.Module]:
    """Untrained networks after k steps each, in eval mode; an exchange ends each part but the last.

    Args:
        job: The repetition; worker i sees what member i sees.
        own_starts: Whether each worker starts from first weights of its own.
        parts: Parts of the training.
        method: How `fuse` makes one network of all; None leaves every worker alone.
        rate: Highest learning rate; it falls to 0 over all parts together, as a cosine.
    """
    seeds = [100 * job.seed + (worker if own_starts else 0) for worker in range(job.n)]
    workers = [job.case.fresh(seed) for seed in seeds]
    cuts = [job.options.steps * part // parts for part in range(parts + 1)]
    for part, (begin, end) in enumerate(itertools.pairwise(cuts)):
        if part and method is not None:
            fused = job.fused(workers, method=method, verify=False)
            workers = [copy.deepcopy(fused) for _ in workers]
        for worker, module in enumerate(workers):
            _train(job, module, worker, begin, end, rate)
    return workers


def _train(job: Job, module: nn.Module, worker: int, begin: int, end: int, rate: float) -> None:
    steps, case = job.options.steps, job.case
    indices = seen(case.data, case.parts, job.setting, job.n, worker, 100 * job.seed + worker)
    inputs, labels = case.data.inputs[indices], case.data.labels[indices]
    # A part may be shorter than a pass, so each has an order of its own.
    seed = (100 * job.seed + worker) * steps + begin
    # Moments of AdamW say nothing of the units that an exchange brings in: each part has its own.
    optimizer = torch.optim.AdamW(module.parameters(), lr=rate)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 + 0.5 * math.cos(math.pi * (begin + step) / steps)
    )
    finetune(
        module,
        Batches(inputs, labels, job.options.batch, seed=seed),
        steps=end - begin,
        optimizer=optimizer,
        scheduler=scheduler,
        progress=False,
        seed=seed,
    )


EXPERIMENT = Experiment(
    name="sync_sgd",
    title="Training in parallel with exchanges",
    about="N untrained workers train in parallel for k steps, worker i on what member i sees. "
    "Every so many steps they exchange: one network is made of all, by Neuron Transplantation "
    "(l2) or by averaging, and each goes on from it. The worker that validates best is reported. "
    "Workers start from the same first weights or from their own. The members of the last "
    "lines were trained for as long as in the other tables.",
    measure=measure,
    line="steps between exchanges",
    settings=("same data",),
    steps=240,
)

if __name__ == "__main__":
    command(EXPERIMENT)
