"""The depth of the members, from one layer or block to eight.

python -m benchmarks.paper.depth
"""

from __future__ import annotations

from benchmarks.paper.experiment import Experiment, Job, Row
from benchmarks.paper.refining import swept
from benchmarks.paper.runner import command
from benchmarks.paper.setting import Size

DEPTHS = (1, 2, 4, 8)


def measure(job: Job) -> list[Row]:
    return swept(job, {depth: Size(depth=depth) for depth in DEPTHS})


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
