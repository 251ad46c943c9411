"""The share of units that are transplanted into the best member, from none to all.

python -m benchmarks.paper.fraction
"""

from __future__ import annotations

from benchmarks.paper.experiment import Experiment, Job, Row
from benchmarks.paper.refining import both, controls
from benchmarks.paper.runner import command

TENTHS = range(11)


def measure(job: Job) -> list[Row]:
    base_member = next(i for i, member in enumerate(job.case.members) if member is job.case.best)
    rows = []
    for tenth in TENTHS:
        share = tenth / len(TENTHS[1:])
        rows += both(job, f"{share:g}", job.fused(fraction=share, base_member=base_member), share)
    return rows + controls(job)


EXPERIMENT = Experiment(
    name="fraction",
    title="Transplant fraction",
    about="A share of the best member's units, the least important ones (l2), gives way to the "
    "most important units of the others: 0 is the best member, 1 has none of its units left. "
    "Logits are the mean over the members whatever the fraction, so a fused network's head "
    "reads each unit with 1/N of its weight.",
    measure=measure,
    line="fraction",
)

if __name__ == "__main__":
    command(EXPERIMENT)
