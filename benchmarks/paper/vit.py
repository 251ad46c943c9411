"""Fusion methods side by side for the vision transformer.

python -m benchmarks.paper.vit
"""

from __future__ import annotations

import dataclasses

from benchmarks.paper import compare
from benchmarks.paper.runner import command

EXPERIMENT = dataclasses.replace(
    compare.EXPERIMENT,
    name="vit",
    title="Methods, vision transformer",
    networks=("vit",),
    ns=(2,),
)

if __name__ == "__main__":
    command(EXPERIMENT)
