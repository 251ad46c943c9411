"""The number of members, fused at once, one by one or in pairs.

python -m benchmarks.paper.members [-n 2 3 4 6 8]
"""

from __future__ import annotations

from benchmarks.paper.experiment import Experiment, Job, Row
from benchmarks.paper.refining import both, controls, refitted
from benchmarks.paper.runner import command

VARIANTS = {"joint": None, "iterative": "iterative", "hierarchical": "hierarchical"}


def measure(job: Job) -> list[Row]:
    rows = []
    for name, variant in VARIANTS.items():
        rows += both(job, name, job.fused(variant=variant))
    rows += both(job, "joint (obs) + refit", refitted(job))
    return rows + controls(job)


EXPERIMENT = Experiment(
    name="members",
    title="Number of members",
    about="Neuron Transplantation (l2) of N members into one network of a member's width: all at "
    "once (joint), one after the other (iterative), or pairs, then pairs of the results "
    "(hierarchical); as fused, and after k steps of fine-tuning. The transplantation with obs "
    "and refit, which needs calibration inputs, is joint.",
    measure=measure,
    line="members",
    settings=("same data",),
    ns=(2, 3, 4, 6, 8),
    along_n=True,
)

if __name__ == "__main__":
    command(EXPERIMENT)
