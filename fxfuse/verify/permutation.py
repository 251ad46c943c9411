"""The permutation oracle."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from fxfuse.analysis.constraints import Constraints
from fxfuse.analysis.coupling import CouplingGraph, CouplingGroup, couple
from fxfuse.graph.capture import Program
from fxfuse.transform.apply import moved_tensor, random_permutations
from fxfuse.verify.check import (
    EXACT,
    Check,
    as_program,
    is_double,
    precision_in_words,
    relative_error,
    rounding_error,
    run,
    tolerated,
)
from fxfuse.verify.in_double import Changed
from fxfuse.verify.outputs import put_back

#: What a network answers, in float64.
Outputs = list[torch.Tensor]


def permutation(
    model: nn.Module | Program,
    example: Any = (),
    *,
    constraints: Constraints | None = None,
    seed: int = 0,
) -> Check:
    """Permutation oracle: random permutations of all coupling groups leave the outputs unchanged.

    Runs in float64, on the inputs that the network was captured with. Where units are handed out
    (`output_dims`), the outputs are first put back into the order of the network.

    Args:
        model: The network, or a captured one.
        example: A tensor, a tuple, a mapping of keyword inputs, or an `Example`.
        constraints: The options of `fxfuse.analyze`.
        seed: Seed of the permutations.

    Returns:
        The largest difference of an output. The detail says how much the outputs depend on the
        inputs: the oracle sees little of a network that ignores them.
    """
    graph = couple(as_program(model, example), constraints or Constraints())
    return permutation_of(graph, seed=seed)


def permutation_of(graph: CouplingGraph, *, seed: int = 0) -> Check:
    """Return the permutation oracle on an analysis that exists."""
    reference = run(graph.program, graph.program.state())
    error = _permuted_error(graph, graph.groups, seed, reference)
    tolerance, floor = _tolerance(graph, error, seed, reference)
    detail = f"{len(graph.groups)} groups, {graph.free_fraction:.2%} of the weights are free; "
    detail += precision_in_words(reference)
    if not isfinite(error):
        detail += "an output is not finite; "
    if floor and is_double(reference):
        detail += "ill-conditioned: one rounding of the weights changes the outputs by "
        detail += f"{floor:.1e}; "
    seen = _between_rows(graph.program, reference) or _sensitivity(graph.program, reference)
    detail += f"two inputs differ by {seen:.1e} in the outputs"
    return Check("permutation", error, tolerance, error <= tolerance, detail)


def wrong_groups(graph: CouplingGraph, *, seed: int = 0) -> tuple[CouplingGroup, ...]:
    """Groups that the permutation oracle cannot move, found by bisection; empty when it holds."""
    reference = run(graph.program, graph.program.state())
    error = _permuted_error(graph, graph.groups, seed, reference)
    tolerance, _ = _tolerance(graph, error, seed, reference)
    return _bisect(graph, graph.groups, tolerance, seed, reference)


def _tolerance(
    graph: CouplingGraph, error: float, seed: int, reference: Outputs
) -> tuple[float, float]:
    """Return the tolerance, and what rounding alone does to the outputs where that had to be asked.

    A network that meets inputs unlike those it was trained on may amplify rounding by many orders
    of magnitude. A permutation changes the order of sums, so it cannot be told from rounding there.
    """
    if error <= EXACT or not isfinite(error):
        return EXACT, 0.0
    floor = rounding_error(graph.program, graph.program.state(), reference, seed=seed)
    return max(EXACT, tolerated(floor, reference)), floor


def _bisect(
    graph: CouplingGraph,
    groups: Sequence[CouplingGroup],
    tolerance: float,
    seed: int,
    reference: Outputs,
) -> tuple[CouplingGroup, ...]:
    if not groups or _permuted_error(graph, groups, seed, reference) <= tolerance:
        return ()
    if len(groups) == 1:
        return tuple(groups)
    middle = len(groups) // 2
    halves = (groups[:middle], groups[middle:])
    found = tuple(g for half in halves for g in _bisect(graph, half, tolerance, seed, reference))
    # Groups that are only wrong together are all wrong.
    return found or tuple(groups)


def _permuted_error(
    graph: CouplingGraph, groups: Sequence[CouplingGroup], seed: int, reference: Outputs
) -> float:
    moves = random_permutations(groups, np.random.default_rng(seed))
    state = Changed(graph.program.state(), lambda name, t: moved_tensor(name, t, graph, moves))
    return relative_error(put_back(graph, moves, run(graph.program, state)), reference)


def sensitivity(program: Program) -> float:
    """Return relative difference between the outputs for two different inputs of the same shape."""
    return _sensitivity(program, run(program, program.state()))


def _sensitivity(program: Program, reference: Outputs) -> float:
    return relative_error(run(program, program.state(), flip=True), reference)


def _between_rows(program: Program, reference: Outputs) -> float:
    """Return the relative difference of the outputs for one input of the example and the next.

    0 where the outputs have no batch dimension that is known for one, or inputs are alike.
    """
    values = [n.meta.get("val") for n in program.outputs() if isinstance(n, fx.Node)]
    shapes = [value.shape for value in values if isinstance(value, torch.Tensor)]
    if not program.dynamic_batch or not all(isinstance(s[0], torch.SymInt) for s in shapes if s):
        return 0.0
    if any(not output.dim() for output in reference):
        return 0.0
    return relative_error([output.roll(1, 0) for output in reference], reference)
