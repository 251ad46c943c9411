"""Members of different widths, fused into a network of the narrow one's size up to all units.

python -m benchmarks.paper.different
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

from benchmarks.paper.experiment import Experiment, Job, Row, along
from benchmarks.paper.refining import both, controls
from benchmarks.paper.runner import command
from benchmarks.paper.setting import Case, Size, network
from fxfuse import fuse

#: Widths of the members, in turn.
WIDTHS = (0.5, 1.0)


@dataclass(frozen=True)
class Different(Job):
    """A repetition whose members differ in width."""

    @functools.cached_property
    def case(self) -> Case:
        """The members: each as it is among members of its own width."""
        each = [WIDTHS[i % len(WIDTHS)] for i in range(self.n)]
        cases = {
            width: Job.case.func(dataclasses.replace(self, size=Size(width=width)))
            for width in dict.fromkeys(each)
        }
        members = tuple(cases[width].members[i] for i, width in enumerate(each))
        return dataclasses.replace(cases[each[0]], members=members)


def measure(job: Job) -> list[Row]:
    own = Different(**{f.name: getattr(job, f.name) for f in dataclasses.fields(job)})
    each = [WIDTHS[i % len(WIDTHS)] for i in range(job.n)]
    mean = sum(each) / job.n
    rows = []
    for target in (*sorted(set(each)), sum(each)):
        fused = fuse(own.program, size=target / mean).module
        fresh = network(job.network, job.data, job.seed, Size(width=target))
        found = [*both(own, "NT (l2)", fused), both(own, "untrained network", fresh)[-1]]
        rows += along(f"{target:g}", target, found)
    return rows + controls(own)


EXPERIMENT = Experiment(
    name="different",
    title="Members of different widths",
    about="Members of half the usual width and of the usual width in turn, fused into one network: "
    "as wide as the narrow member, as the wide one, and as all of them together. The score decides "
    "who provides which unit. No calibration inputs are used. An "
    "untrained network of the same size is trained for the same k steps.",
    measure=measure,
    line="width of the fused network",
)

if __name__ == "__main__":
    command(EXPERIMENT)
