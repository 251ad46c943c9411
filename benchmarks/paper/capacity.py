"""N small members side by side, and fused, against one network of their size together.

python -m benchmarks.paper.capacity [-n 2 4]
"""

from __future__ import annotations

import dataclasses

from benchmarks.paper.experiment import Experiment, Job, Row
from benchmarks.paper.refining import both, controls
from benchmarks.paper.runner import command
from benchmarks.paper.setting import Size, members
from fxfuse import Transplant, fuse, prune
from tests.options import flat


def measure(job: Job) -> list[Row]:
    small = dataclasses.replace(job, size=Size(width=1 / job.n))
    inputs, calibration = small.calibration[:2], small.calibration
    fitted = {"score": "obs", "calibration": calibration, "refit": True}
    together = fuse(small.program, size=job.n)
    fused = fuse(small.program, **flat(**fitted))
    # It sees what all members see together, for as many steps as each of them.
    (large,) = members(job.network, job.data, "same data", 1, job.seed, job.options.member_steps)
    pruned = prune(
        large,
        inputs,
        calibration=calibration,
        method=Transplant(score="obs"),
        size=1 / job.n,
        refine=[],
    )
    return [
        *both(small, "small members side by side", together.module),
        *both(small, "small members fused: NT (obs) + refit", fused.module),
        *both(small, "one large network", large),
        *both(small, "one large network, pruned (obs) to a small one", pruned.module),
        *controls(small),
    ]


EXPERIMENT = Experiment(
    name="capacity",
    title="Equal capacity",
    about="N members of 1/N of the usual width, side by side (as many units in each layer as one "
    "network of the usual width, and 1/N of its hidden weights) or fused into one of their own "
    "width; against one network of the usual width, trained on the same data for as many steps as "
    "each member, and that network pruned to a member's width. The best member is a small one.",
    measure=measure,
    line="network",
    settings=("same data",),
    ns=(2, 4),
)

if __name__ == "__main__":
    command(EXPERIMENT)
