"""Scores `taylor` and `fisher`: what the loss would suffer without a unit, by its gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from fxfuse.activations.gradients import Gradients
from fxfuse.analysis.coupling import CouplingGraph
from fxfuse.planning.context import Context, State
from fxfuse.planning.measured import require_gradients
from fxfuse.planning.scores.owned import owned_sums
from fxfuse.planning.scores.registry import Kept, Scores, score


@score("taylor")
def taylor(
    graph: CouplingGraph, states: Sequence[State], context: Context, kept: Kept
) -> dict[int, Scores]:
    """Σ |w · ∂L/∂w| over the parameters of a unit (Molchanov et al., arXiv:1906.10771).

    The gradient is the mean over the batches.
    """

    def damage(given: Gradients, name: str, weight: torch.Tensor) -> torch.Tensor:
        return (weight * given.mean[name].to(weight.device)).abs()

    return _summed(graph, states, context, kept, "taylor", damage)


@score("fisher")
def fisher(
    graph: CouplingGraph, states: Sequence[State], context: Context, kept: Kept
) -> dict[int, Scores]:
    """Σ (w · ∂L/∂w)² over the parameters of a unit, the mean over the batches."""

    def damage(given: Gradients, name: str, weight: torch.Tensor) -> torch.Tensor:
        return weight.abs() ** 2 * given.square[name].to(weight.device)

    return _summed(graph, states, context, kept, "fisher", damage)


def _summed(
    graph: CouplingGraph,
    states: Sequence[State],
    context: Context,
    kept: Kept,
    name: str,
    damage: Callable[[Gradients, str, torch.Tensor], torch.Tensor],
) -> dict[int, Scores]:
    given = require_gradients(graph, states, context, f"score {name!r}")
    owned = {tensor for tensor, _ in graph.group_of}
    found = {}
    for member, units in kept.items():
        values = {
            tensor: damage(given[member], tensor, states[member][tensor].detach())
            for tensor in sorted(owned & given[member].mean.keys())
        }
        found[member] = owned_sums(graph.of_member(member), values, units)
    return found
