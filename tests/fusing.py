"""What tests of methods and scores share: activations, permuted copies, fused outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import fx

from fxfuse.analysis import labels
from fxfuse.analysis.coupling import CouplingGraph, couple
from fxfuse.transform.apply import fused_tensors, permuted, random_permutations
from fxfuse.transform.emit import emit
from fxfuse.verify.check import as_double, in_double, inputs_of, relative_error, run
from tests.options import planned

State = Mapping[str, torch.Tensor]

aten = torch.ops.aten
#: Operators whose second argument is the weight → the channel dimension of the result.
_CHANNEL = {aten.conv2d.default: 1, aten.linear.default: -1}


class _Recorder(fx.Interpreter):
    """Keeps what every convolution and linear layer answers, by the name of its weight."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.answers: dict[str, torch.Tensor] = {}

    def run_node(self, n: fx.Node) -> object:
        result = super().run_node(n)
        if n.target in _CHANNEL:
            channels_last = result.movedim(_CHANNEL[n.target], -1)
            self.answers[str(n.args[1].target)] = channels_last.reshape(-1, channels_last.shape[-1])
        return result


def activations(
    graph: CouplingGraph, states: Sequence[State], *inputs: torch.Tensor
) -> dict[str, list[torch.Tensor]]:
    """Pre-activations of every unit: for each group, for each member, [rows, n_units]."""
    found: dict[str, list[torch.Tensor]] = {group.name: [] for group in graph.groups}
    for state in states:
        module = in_double(emit(graph.program, as_double(state)))
        recorder = _Recorder(module)
        args = tuple(x.double() for x in inputs) or inputs_of(graph.program)[0]
        with torch.no_grad():
            recorder.run(*args)
        for group in graph.groups:
            name, dim = next(p for p in group.index if p[0] in recorder.answers and p[1] == 0)
            rows = torch.from_numpy(group.index[(name, dim)])
            answers = recorder.answers[name][:, rows]  # [rows, n_units, slots]
            found[group.name].append(answers.movedim(2, 0).reshape(-1, group.n_units))
    return found


def permuted_copies(graph: CouplingGraph, n: int, seed: int = 0) -> list[State]:
    """The network and n - 1 randomly permuted copies of it, in float64."""
    own = as_double(graph.program.state())
    generator = np.random.default_rng(seed)
    copies = [
        permuted(own, graph, random_permutations(graph.groups, generator)) for _ in range(n - 1)
    ]
    return [own, *copies]


def distance_to_the_first(
    graph: CouplingGraph, states: Sequence[State], method: str, options: dict[str, Any]
) -> float:
    """Relative error of the fused network's outputs against those of the first member."""
    plan = planned(graph, states, method, **options)
    fused = fused_tensors(graph, plan, states)
    return relative_error(run(graph.program, fused), run(graph.program, states[0]))


def check_without_repetitions(graph: CouplingGraph) -> None:
    """Analysed as if every field were large, a network has the same groups, frozen for the same.

    Labels of many places are kept without their repetitions; here those of all places are.
    """
    with mock.patch.object(labels, "LARGE", 0):
        again = couple(graph.program, graph.constraints)
    assert _told(again) == _told(graph)


def _told(graph: CouplingGraph) -> dict[str, Any]:
    return {
        "groups": [
            (g.name, g.n_units, [(place, rows.tolist()) for place, rows in g.index.items()])
            for g in graph.groups
        ],
        "frozen": {
            place: (r.kind, r.why, r.node, r.operator, r.inside, r.indices.tolist())
            for place, r in graph.frozen.items()
        },
        "mixing": graph.mixing,
        "roles": (graph.readers, graph.writers),
        "without rule": graph.without_rule,
    }
