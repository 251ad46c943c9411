"""Widths by group: units stay where they buy most for what they cost."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fxfuse.activations.elimination import errors_by_size
from fxfuse.analysis.coupling import CouplingGraph
from fxfuse.planning.context import Context, State
from fxfuse.planning.scores import score_units
from fxfuse.planning.size import Sizes

#: What keeping 1, 2, ... and all units of a group costs in quality, float64 [units].
Errors = NDArray[np.float64]

#: How often prices are looked up anew: what a unit costs depends on the other groups' sizes.
_ROUNDS = 3


def errors_of(
    graph: CouplingGraph, states: Sequence[State], score: str, context: Context
) -> dict[str, Errors]:
    """Return what each number of units of a group costs, all groups in one currency.

    On calibration inputs, as far as a layer reads a group, the second-order error of removing units
    that the others make up for (`fxfuse.activations.elimination`). Without inputs, a unit is worth
    its share of the scores of its group, and groups are worth the same.
    """
    if context.calibration is not None:
        assert context.sizes is not None
        return errors_by_size(
            graph,
            states,
            context.calibration,
            sizes=context.sizes,
            base_member=context.base_member,
        )
    every = range(len(states))
    alive = {m: {g.name: np.arange(graph.units_of(g.name, m)) for g in graph.groups} for m in every}
    scores = score_units(graph, states, score, context, alive)
    errors = {}
    for group in graph.groups:
        values = np.sort(np.concatenate([scores[m][group.name] for m in every]))
        lost = np.concatenate([[0.0], np.cumsum(values[:-1])]) / (values.sum() or 1.0)
        errors[group.name] = -np.log1p(-lost[::-1].clip(max=1 - 1e-9))
    return errors


def spread(
    errors: Mapping[str, Errors],
    uniform: Sizes,
    steps: Mapping[str, int],
    cost: Callable[[Sizes], float],
    reach: int = 1,
) -> Sizes:
    """Find sizes of less error that cost no more than the budget, or return those there were.

    From all units on, those go first whose error is least for what they cost: along the lower
    convex hull of each group's errors, which is where the Lagrangian is smallest (Everett,
    "Generalized Lagrange multiplier method", Operations Research 1963).

    Args:
        errors: For each group that may change, its errors.
        uniform: Sizes within the budget: where the prices are looked up first.
        steps: For each group that may change, of how many units its size is a multiple.
        cost: What a network of some sizes costs, as a share of the budget.
        reach: Over how many steps the price of a unit is looked up.
    """

    def total(sizes: Sizes) -> float:
        return sum(float(each[sizes[name] - 1]) for name, each in errors.items())

    best = found = dict(uniform)
    for _ in range(_ROUNDS):
        at, path = cost(found), list[tuple[float, str, int]]()
        for name, each in errors.items():
            step, units = steps[name], found[name]
            corners = _hull(each, step)
            if len(corners) == 1:
                continue
            other = max(units - reach * step, step)
            if units <= step:
                other = min(units + reach * step, len(each))
            price = (at - cost({**found, name: other})) / (units - other)
            path += [
                ((each[few - 1] - each[many - 1]) / (max(price, 1e-12) * (many - few)), name, few)
                for many, few in itertools.pairwise(corners)
            ]
        path.sort(key=lambda corner: corner[0])
        widest = {name: _hull(each, steps[name])[0] for name, each in errors.items()}
        found = _first_within({**uniform, **widest}, path, cost)
        if cost(found) <= 1 and total(found) < total(best):
            best = found
    return best


def _hull(errors: Errors, step: int) -> list[int]:
    """The sizes, from the largest on, at the corners of the lower convex hull of their errors."""
    corners: list[int] = []
    for size in range(len(errors) // step * step, 0, -step):
        # A corner above the line from the one before it to this size is none.
        while len(corners) > 1 and _rise(errors, corners[-2], corners[-1]) >= _rise(
            errors, corners[-2], size
        ):
            corners.pop()
        corners.append(size)
    return corners


def _rise(errors: Errors, many: int, few: int) -> float:
    return float(errors[few - 1] - errors[many - 1]) / (many - few)


def _first_within(
    widest: Sizes, path: Sequence[tuple[float, str, int]], cost: Callable[[Sizes], float]
) -> Sizes:
    """The first sizes along a path of smaller and smaller ones that the budget allows."""

    def after(corners: int) -> Sizes:
        return {**widest, **{name: size for _, name, size in path[:corners]}}

    low, high = 0, len(path)
    while low < high:
        middle = (low + high) // 2
        if cost(after(middle)) <= 1:
            high = middle
        else:
            low = middle + 1
    return after(low)
