"""A global budget: groups whose units matter more keep more of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fxfuse.analysis.coupling import CouplingGraph
from fxfuse.planning.context import Context, State
from fxfuse.planning.scores import score_units
from fxfuse.planning.size import Sizes, units_at


def spread(
    graph: CouplingGraph, states: Sequence[State], score: str, context: Context, multiple_of: int
) -> Callable[[Sizes], Sizes]:
    """Make the function from sizes of equally wide groups to those of a global budget.

    A unit's score counts relative to the mean over all members' units of its group. Of all groups
    together the best units are kept, as many as before, and of each group the best one. Channels
    are rounded to multiples of `multiple_of` after the units are counted.
    """
    alive = {
        member: {g.name: np.arange(g.n_units) for g in graph.of_member(member).groups}
        for member in range(len(states))
    }
    scores = score_units(graph.trunk(), states, score, context, alive)
    values = {
        group.name: np.concatenate([scores[member][group.name] for member in alive])
        for group in graph.groups
    }

    def wider_where_it_matters(sizes: Sizes) -> Sizes:
        counts = best_of_all(values, sum(sizes.values()))
        found = {}
        for group in graph.groups:
            one = len(values[group.name]) / len(states)
            width = counts[group.name] / one
            found[group.name] = units_at(graph, group, len(states), width, multiple_of)
        return found

    return wider_where_it_matters


def best_of_all(values: Mapping[str, NDArray[np.float64]], count: int) -> Sizes:
    """Count the units of each group, at least one, among the `count` best of all groups.

    Scores are not negative, float64 [n] for each group.
    """
    relative = {name: each / (each.mean() or 1.0) for name, each in values.items()}
    # The best of each group stays, whatever the others have.
    rest = {name: np.sort(each)[::-1][1:] for name, each in relative.items()}
    owner = np.repeat(np.arange(len(rest)), [len(each) for each in rest.values()])
    order = np.argsort(-np.concatenate([*rest.values(), np.empty(0)]), kind="stable")
    chosen = owner[order[: max(count - len(rest), 0)]]
    return {name: 1 + int((chosen == number).sum()) for number, name in enumerate(rest)}
