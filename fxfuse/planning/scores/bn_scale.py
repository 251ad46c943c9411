"""Score `bn_scale`: the scale of the normalisation that a unit passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from fxfuse.analysis.coupling import CouplingGraph
from fxfuse.graph.arguments import argument
from fxfuse.graph.operator_facts import FACTS, Normalisation
from fxfuse.members.ranks import of_each
from fxfuse.planning.context import Context, State
from fxfuse.planning.scores.magnitude import magnitude
from fxfuse.planning.scores.owned import owned_sums
from fxfuse.planning.scores.registry import Kept, Scores, score


def _without_scale(graph: CouplingGraph) -> list[str]:
    """Return the groups that own no scale of a normalisation."""
    scales = _scales(graph)
    return [g.name for g in graph.groups if not any(name in scales for name, _ in g.index)]


def _note(graph: CouplingGraph) -> Mapping[str, str]:
    missing = _without_scale(graph)
    return {"scored by l2": ", ".join(missing)} if missing else {}


@score("bn_scale", note=_note)
def bn_scale(
    graph: CouplingGraph, states: Sequence[State], context: Context, kept: Kept
) -> dict[int, Scores]:
    """Σ |scale| of a unit (Liu et al., "Network Slimming", arXiv:1708.06519).

    A group that owns no scale of a normalisation is scored by `l2`; the plan's options name it.
    """
    scales, missing = _scales(graph), _without_scale(graph)

    def scored(member: int, state: State) -> Scores:
        return owned_sums(
            graph.of_member(member),
            state,
            kept[member],
            context.absent,
            names=sorted(scales),
            value_of=lambda name, scale: scale.abs(),
        )

    found = dict(of_each(states, scored, kept))
    if missing:
        instead = magnitude(graph, states, context, kept, degree=2)
        for member, scores in found.items():
            scores.update({name: instead[member][name] for name in missing})
    return found


def _scales(graph: CouplingGraph) -> frozenset[str]:
    """Return the canonical names of the parameters that scale what a normalisation returns."""
    program, found = graph.program, set()
    for node in program.graph.nodes:
        facts = FACTS.get(node.target)
        if isinstance(facts, Normalisation):
            weight = argument(node, facts.weight)
            if isinstance(weight, torch.fx.Node) and str(weight.target) in program.canonical:
                found.add(program.canonical[str(weight.target)])
    return frozenset(found & {name for name, _ in graph.group_of})
