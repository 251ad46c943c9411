"""Fusion methods side by side for the residual network.

python -m benchmarks.paper.resnet
"""

from __future__ import annotations

import dataclasses

from benchmarks.paper import compare
from benchmarks.paper.runner import command

EXPERIMENT = dataclasses.replace(
    compare.EXPERIMENT,
    name="resnet",
    title="Methods, residual network",
    networks=("resnet",),
    ns=(2,),
)

if __name__ == "__main__":
    command(EXPERIMENT)
