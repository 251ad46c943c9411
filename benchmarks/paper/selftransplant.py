"""A network fused with itself, and with another network, its control.

python -m benchmarks.paper.selftransplant
"""

from __future__ import annotations

from benchmarks.paper.experiment import Experiment, Job, Row
from benchmarks.paper.refining import both, controls
from benchmarks.paper.runner import command


def measure(job: Job) -> list[Row]:
    place = next(i for i, member in enumerate(job.case.members) if member is job.case.best)
    own = job.program[place]
    other = job.program[(place + 1) % job.n]
    fitted = {"score": "obs", "calibration": job.calibration, "refit": True}
    rows = []
    for name, members in (("itself", [own, own]), ("another member", [own, other])):
        rows += both(job, f"with {name}", job.fused(members))
        rows += both(job, f"with {name}, half of each", job.fused(members, fraction=0.5))
        rows += both(job, f"with {name}, obs + refit", job.fused(members, **fitted))
    return rows + controls(job)


EXPERIMENT = Experiment(
    name="selftransplant",
    title="Self-transplantation",
    about="The best member is fused with itself, and, as a control, with another member. Fused "
    "with itself, its most important units are there twice and the others not at all: what "
    "fine-tuning makes of that is due to the new start, not to another network's knowledge. "
    "The ensemble is that of the two different members.",
    measure=measure,
    line="fused",
)

if __name__ == "__main__":
    command(EXPERIMENT)
