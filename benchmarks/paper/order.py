"""The order of merging, pruning and fine-tuning.

    python -m benchmarks.paper.order [-n 4]

Merging and then fine-tuning before pruning needs a pruning of the wide network, which is not there
yet (README.md says what else is left out).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from benchmarks.paper.experiment import Experiment, Job, Row
from benchmarks.paper.refining import after, both, controls, finetuned, refitted, trained
from benchmarks.paper.runner import command
from fxfuse.analysis.coupling import CouplingGraph
from fxfuse.planning.methods import Context, Method, State
from fxfuse.planning.plan import UnitMap
from fxfuse.planning.scores import score_units


@dataclass(frozen=True)
class PruneFirst(Method):
    """Prunes every member to 1/N of its width by itself, then puts them side by side.

    Where N does not divide a width, the first members keep one unit more.
    """

    def maps(
        self, graph: CouplingGraph, states: Sequence[State], context: Context
    ) -> tuple[UnitMap, ...]:
        alive = {
            member: {group.name: np.arange(group.n_units) for group in graph.groups}
            for member in range(len(states))
        }
        scores = score_units(graph, states, "l2", context, alive)
        maps = []
        for group in graph.groups:
            shares = np.array_split(np.arange(group.n_units), len(states))
            kept = [
                np.sort(np.argsort(-scores[member][group.name], kind="stable")[: len(share)])
                for member, share in enumerate(shares)
            ]
            owner = np.repeat(np.arange(len(states)), [len(units) for units in kept])
            order = np.arange(group.n_units)
            maps.append(UnitMap(group.name, group.n_units, order, owner, np.concatenate(kept)))
        return tuple(maps)


def measure(job: Job) -> list[Row]:
    k = job.options.steps
    rows = both(job, "merge, prune, fine-tune", job.fused())
    rows += both(job, "prune, merge, fine-tune", job.fused(method=PruneFirst()))
    rows += both(job, "merge, prune (obs), refit, fine-tune", refitted(job))
    rows += both(job, "merge and prune one by one, fine-tune", job.fused(variant="iterative"))
    between = _fine_tuned_between(job)
    name = "merge and prune one by one, fine-tune in between"
    rows.append(Row(name, after(job), job.values(between)))
    first = [finetuned(job, member).module for member in job.case.members]
    rows += both(job, f"fine-tune members {k} steps, merge, prune, fine-tune", job.fused(first))
    half = [finetuned(job, member, max(1, k // 2)).module for member in job.case.members]
    refined = finetuned(job, job.fused(half), k - k // 2)
    rows.append(trained(job, "fine-tune members, merge, prune, fine-tune: half each", refined))
    return rows + controls(job)


def _fine_tuned_between(job: Job) -> nn.Module:
    """Each fusion with the next member is followed by its share of the k steps."""
    fused: nn.Module = copy.deepcopy(job.case.members[0])
    shares = np.array_split(np.arange(job.options.steps), job.n - 1)
    for member, share in zip(job.case.members[1:], shares, strict=True):
        fused = finetuned(job, job.fused([fused, member]), len(share)).module
    return fused


EXPERIMENT = Experiment(
    name="order",
    title="Order of merging, pruning and fine-tuning",
    about="Neuron Transplantation (l2) merges the members and prunes to a member's width. Here "
    "members are pruned by themselves first, or fine-tuned on all training data first, or fused "
    "one by one with fine-tuning in between. *0 steps* is before the last fine-tuning, the next "
    "column after k steps; *in between* and *half each* share the k steps out.",
    measure=measure,
    line="order",
    ns=(4,),
)

if __name__ == "__main__":
    command(EXPERIMENT)
