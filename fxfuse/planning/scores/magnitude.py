"""Scores `l1` and `l2`: the magnitude of what a unit owns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch

from fxfuse.analysis.coupling import CouplingGraph
from fxfuse.analysis.labels import Kind
from fxfuse.analysis.rules.registry import name_of
from fxfuse.errors import OptionError
from fxfuse.graph.arguments import argument
from fxfuse.graph.operator_facts import FACTS, Contraction
from fxfuse.members.ranks import of_each
from fxfuse.planning.context import Context, State
from fxfuse.planning.scores.owned import owned_sums
from fxfuse.planning.scores.registry import Kept, Scores, score

#: Score name → degree of the norm.
DEGREES: Mapping[str, int] = {"l1": 1, "l2": 2}


def degree_of(name: str) -> int:
    """Return the degree of a score that is a norm."""
    if name not in DEGREES:
        raise OptionError(
            f"score {name!r} is not a norm of weights", how=f"use one of {', '.join(DEGREES)}"
        )
    return DEGREES[name]


def magnitude(
    graph: CouplingGraph, states: Sequence[State], context: Context, kept: Kept, *, degree: int
) -> dict[int, Scores]:
    """Compute the group magnitude of each unit, float64 [n_units] by member and group.

    The score of a unit is Σ |w|^degree over all weights that it owns: rows of what writes it and
    columns of what reads it (biases, tables that are added, and buffers are left out). This orders
    units as `torch_pruning.importance.MagnitudeImportance(p=degree)` orders the channels of the
    members' concatenation, whose output layer is scaled by 1/N.
    """
    names = multiplied(graph)
    outputs = {n for (n, _), reason in graph.frozen.items() if reason.kind is Kind.OUTPUT}

    def value_of(name: str, weights: torch.Tensor) -> torch.Tensor:
        scale = (1.0 / len(kept)) ** degree if name in outputs else 1.0
        values = weights.square_() if degree == 2 else weights.abs_()
        return values if scale == 1.0 else values.mul_(scale)

    def scored(member: int, state: State) -> Scores:
        return owned_sums(
            graph.of_member(member),
            state,
            kept[member],
            context.absent,
            names=names,
            value_of=value_of,
        )

    return dict(of_each(states, scored, kept))


for _name, _degree in DEGREES.items():
    score(_name)(partial(magnitude, degree=_degree))


def multiplied(graph: CouplingGraph) -> list[str]:
    """Return the parameters of groups that multiply activations (not biases, not added tables)."""
    owned = {name for name, _ in graph.group_of}
    used: dict[str, bool] = {}
    program = graph.program
    for node in program.graph.nodes:
        if node.op != "get_attr" or str(node.target) not in program.canonical:
            continue
        name = program.canonical[str(node.target)]
        if not isinstance(program.tensor(name), torch.nn.Parameter):
            continue
        for user in node.users:
            used[name] = used.get(name, False) or not _is_added(node, user)
    return [name for name, multiplies in used.items() if multiplies and name in owned]


def _is_added(node: torch.fx.Node, user: torch.fx.Node) -> bool:
    if name_of(user.target) in ("aten::add", "aten::add_", "aten::sub", "aten::sub_"):
        return True
    facts, added = FACTS.get(user.target), ("bias", "running_mean", "running_var")
    addend = (facts.bias,) if isinstance(facts, Contraction) else ()
    return any(argument(user, n) is node for n in (*added, *addend))
