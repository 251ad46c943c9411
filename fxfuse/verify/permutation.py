"""The permutation oracle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

import numpy as np
from torch import nn

from fxfuse.apply import permuted, random_permutations
from fxfuse.capture import Captured
from fxfuse.coupling import CouplingGraph, CouplingGroup, analyze
from fxfuse.verify.check import Check, relative_error, run, tolerance_of


def permutation(
    model: nn.Module | Captured,
    example_inputs: Any = (),
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
) -> Check:
    """Permutation oracle: random permutations of all coupling groups leave the outputs unchanged.

    Runs in float64, on the inputs that the network was captured with.

    Args:
        model: The network, or a captured one.
        example_inputs: A tensor or a tuple of inputs.
        example_kwargs: Keyword inputs.
        seed: Seed of the permutations.

    Returns:
        The largest difference of an output. The detail says how much the outputs depend on the
        inputs: the oracle sees little of a network that ignores them.
    """
    graph = analyze(model, example_inputs, example_kwargs)
    return permutation_of(graph, seed=seed)


def permutation_of(graph: CouplingGraph, *, seed: int = 0) -> Check:
    """The permutation oracle on an analysis that exists."""
    error = _permuted_error(graph, graph.groups, seed)
    tolerance = tolerance_of(graph.captured)
    detail = f"{len(graph.groups)} groups, {graph.free_fraction:.2%} of the weights are free; "
    if not isfinite(error):
        detail += "an output is not finite; "
    detail += f"two inputs differ by {sensitivity(graph.captured):.1e} in the outputs"
    return Check("permutation", error, tolerance, error <= tolerance, detail)


def wrong_groups(graph: CouplingGraph, *, seed: int = 0) -> tuple[CouplingGroup, ...]:
    """Groups that the permutation oracle cannot move, found by bisection; empty when it holds."""
    return _bisect(graph, graph.groups, tolerance_of(graph.captured), seed)


def _bisect(
    graph: CouplingGraph, groups: Sequence[CouplingGroup], tolerance: float, seed: int
) -> tuple[CouplingGroup, ...]:
    if not groups or _permuted_error(graph, groups, seed) <= tolerance:
        return ()
    if len(groups) == 1:
        return tuple(groups)
    middle = len(groups) // 2
    halves = (groups[:middle], groups[middle:])
    found = tuple(g for half in halves for g in _bisect(graph, half, tolerance, seed))
    # Groups that are only wrong together are all wrong.
    return found or tuple(groups)


def _permuted_error(graph: CouplingGraph, groups: Sequence[CouplingGroup], seed: int) -> float:
    moves = random_permutations(groups, np.random.default_rng(seed))
    reference = run(graph.captured, graph.captured.state())
    moved = run(graph.captured, permuted(graph.captured.state(), graph, moves))
    return relative_error(moved, reference)


def sensitivity(captured: Captured) -> float:
    """Relative difference between the outputs for two different inputs of the same shape."""
    state = captured.state()
    return relative_error(run(captured, state, flip=True), run(captured, state))
