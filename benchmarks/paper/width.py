"""The width of the members, from a quarter to four times their own.

python -m benchmarks.paper.width
"""

from __future__ import annotations

from benchmarks.paper.experiment import Experiment, Job, Row
from benchmarks.paper.refining import swept
from benchmarks.paper.runner import command
from benchmarks.paper.setting import Size

WIDTHS = (0.25, 0.5, 1.0, 2.0, 4.0)


def measure(job: Job) -> list[Row]:
    return swept(job, {width: Size(width=width) for width in WIDTHS})


EXPERIMENT = Experiment(
    name="width",
    title="Width of the members",
    about="Members whose hidden widths are a quarter to four times those of the other tables, all "
    "trained alike, fused into one network of their width.",
    measure=measure,
    line="width",
    logarithmic=("x",),
)

if __name__ == "__main__":
    command(EXPERIMENT)
