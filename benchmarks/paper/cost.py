"""Time and memory of fusing against the width of the members (Linux).

    python -m benchmarks.paper.cost

Networks are untrained: their weights do not matter here. Everything is done once at the least width
beforehand, so that what is imported and made once per process is not counted.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

from torch import nn

from benchmarks.paper.experiment import Experiment, Job, Row
from benchmarks.paper.memory import peak
from benchmarks.paper.runner import command
from benchmarks.paper.setting import Size, network
from fxfuse import fuse
from fxfuse.cli.data import Batches
from fxfuse.refine import default_optimizer, finetune
from tests.options import flat

WIDTHS = (0.5, 1.0, 2.0, 4.0, 8.0)
_FUSIONS: dict[str, dict[str, Any]] = {
    "average": {"method": "average"},
    "weight matching": {"method": "weight_matching"},
    "optimal transport": {"method": "optimal_transport"},
    "NT (l2)": {},
}
_CALIBRATED: dict[str, dict[str, Any]] = {
    "zip": {"method": "zip"},
    "NT (obs) + refit": {"score": "obs", "refit": True},
}
# A few steps tell the time of many.
_TIMED_STEPS = 10


def measure(job: Job) -> list[Row]:
    _of_width(job, min(WIDTHS))
    return [row for width in WIDTHS for row in _of_width(job, width)]


def _of_width(job: Job, width: float) -> list[Row]:
    inputs = job.data.inputs[: job.options.calibration]
    options = {
        **_FUSIONS,
        **{name: {**told, "calibration": inputs} for name, told in _CALIBRATED.items()},
    }
    members = _members(job, width)
    rows = []

    steps = min(_TIMED_STEPS, job.options.steps)
    training = _cost(lambda: _train(job, copy.deepcopy(members[0]), steps))
    training["seconds"] *= job.options.steps / steps

    def add(column: str, values: dict[str, float]) -> None:
        ratio = values["seconds"] / training["seconds"]
        rows.append(Row(f"{width:g}", column, {**values, "ratio": ratio}, width))

    for name, told in options.items():
        add(
            name,
            _cost(lambda told=told: fuse(members, inputs[:2], verify=False, **flat(**told))),
        )
    add(f"{job.options.steps} training steps", training)
    return rows


def _cost(call: Callable[[], Any]) -> dict[str, float]:
    """CPU seconds, and MB of memory beyond what there was before, at most."""
    with peak() as memory:
        start = time.process_time()
        call()
        seconds = time.process_time() - start
    return {"seconds": seconds, "megabytes": memory.megabytes}


def _train(job: Job, module: nn.Module, steps: int) -> None:
    optimizer, scheduler = default_optimizer(module, steps)
    batches = Batches(job.data.inputs, job.data.labels, job.options.batch)
    finetune(module, batches, steps=steps, optimizer=optimizer, scheduler=scheduler, progress=False)


def _members(job: Job, width: float) -> list[nn.Module]:
    seeds = range(100 * job.seed, 100 * job.seed + job.n)
    return [network(job.network, job.data, seed, Size(width)).eval() for seed in seeds]


EXPERIMENT = Experiment(
    name="cost",
    title="Time and memory",
    about="CPU seconds on one thread, and the memory that fusing takes beyond the members' own, at "
    "most. Width 1 is that of the other tables' networks. Capture and analysis are counted, "
    "verification is not. The last column, the control, is k steps of training one member.",
    measure=measure,
    line="width",
    measures={
        "seconds": "CPU seconds",
        "ratio": "CPU time over that of the training steps",
        "megabytes": "memory, MB",
    },
    settings=("same data",),
    logarithmic=("x", "y"),
)

if __name__ == "__main__":
    command(EXPERIMENT)
