"""The sparsity of the fused network, from none of the members' units removed to 99 %.

python -m benchmarks.paper.sparsity
"""

from __future__ import annotations

import numpy as np
from torch import nn

from benchmarks.paper.experiment import Experiment, Job, Row, along
from benchmarks.paper.refining import both, controls
from benchmarks.paper.runner import command
from fxfuse import analyze, fuse
from fxfuse.planning.context import Context
from fxfuse.planning.scores import score_units
from fxfuse.planning.size import sizes_of
from tests.options import flat

SPARSITIES = (0.0, 0.5, 0.75, 0.9, 0.99)


def measure(job: Job) -> list[Row]:
    rows = []
    for sparsity in SPARSITIES:
        width = job.n * (1 - sparsity)
        calibrated = {"score": "obs", "calibration": job.calibration, "refit": True}
        networks = {
            "NT (l2)": _fused(job, width=_widths(job, width)),
            "NT (l2), global": _fused(job, width=_widths_of_best(job, width)),
            "NT (obs) + refit": _fused(job, width=_widths(job, width), **calibrated),
        }
        for name, module in networks.items():
            rows += along(f"{sparsity:g}", sparsity, both(job, name, module))
    return rows + controls(job)


def _fused(job: Job, **options: object) -> nn.Module:
    return fuse(job.program, **flat(mixing="joint", **options)).module


def _widths(job: Job, width: float) -> dict[str, float]:
    """The width of every group, one unit at least."""
    groups = analyze(job.program[0]).groups
    return {g.name.rpartition(":")[0]: max(width, 1 / g.n_units) for g in groups}


def _widths_of_best(job: Job, width: float) -> dict[str, float]:
    """The width of every group if the best units of all groups stay, and of each group the best."""
    graph, states = analyze(job.program[0]), [program.state() for program in job.program]
    every = range(len(states))
    alive = {m: {g.name: np.arange(g.n_units) for g in graph.groups} for m in every}
    scores = score_units(graph, states, "l2", Context(), alive)
    left: list[tuple[float, str]] = []
    counts = {group.name: 1 for group in graph.groups}
    for name in counts:
        values = np.sort(np.concatenate([scores[member][name] for member in every]))[::-1]
        left += [(value, name) for value in (values / (values.mean() or 1.0))[1:]]
    sizes = sizes_of(graph, len(states), width, at_least_one=True)
    left.sort(key=lambda unit: -unit[0])
    for _, name in left[: max(sum(sizes.values()) - len(counts), 0)]:
        counts[name] += 1
    return {g.name.rpartition(":")[0]: counts[g.name] / g.n_units for g in graph.groups}


EXPERIMENT = Experiment(
    name="sparsity",
    title="Sparsity of the fused network",
    about="Of all units of all members a share is removed: 0 keeps the members side by side, 0.5 "
    "is a member's width for two members, 0.99 leaves one unit or a few in each layer. Every layer "
    "is cut by the same share, or all layers together (global: units are compared by their score "
    "relative to the mean of their layer); one unit at least stays.",
    measure=measure,
    line="sparsity",
)

if __name__ == "__main__":
    command(EXPERIMENT)
