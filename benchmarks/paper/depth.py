"""The depth of the members, from one layer or block to eight.

python -m benchmarks.paper.depth
"""

from __future__ import annotations

import dataclasses

from benchmarks.paper.experiment import Experiment, Job, Row, along
from benchmarks.paper.refining import transplants_and_controls
from benchmarks.paper.runner import command
from benchmarks.paper.setting import Size

DEPTHS = (1, 2, 4, 8)


def measure(job: Job) -> list[Row]:
    rows = []
    for depth in DEPTHS:
        sized = dataclasses.replace(job, size=Size(depth=depth))
        rows += along(f"{depth}", depth, transplants_and_controls(sized))
    return rows


EXPERIMENT = Experiment(
    name="depth",
    title="Depth of the members",
    about="Members of one to eight hidden layers (MLP), convolutions (VGG: spread over its three "
    "stages, the last ones first) or blocks (ResNet, ViT), all trained alike, fused into one "
    "network of their depth.",
    measure=measure,
    line="depth",
)

if __name__ == "__main__":
    command(EXPERIMENT)
