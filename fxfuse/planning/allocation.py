"""A global budget: groups whose units matter more keep more of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from fxfuse.analysis.coupling import CouplingGraph
from fxfuse.errors import OptionError
from fxfuse.planning.options import Options, State
from fxfuse.planning.scores import score_units
from fxfuse.planning.widths import Sizes, Width, units_at

#: Every group has the width, or all groups together have the units that they would have so.
Budget = Literal["local", "global"]


def check_budget(budget: str, width: Width | None, *, given: bool, score: str) -> None:
    """Checks that a budget can be spread."""
    if budget not in get_args(Budget):
        raise OptionError(
            f"unknown budget {budget!r}", how=f"use one of {', '.join(get_args(Budget))}"
        )
    if budget == "local":
        return
    if not given:
        raise OptionError(
            "budget='global' needs a size",
            why="width, max_params and max_flops are all missing",
            how="pass one of them, such as width=0.5 to keep half of all units",
        )
    if isinstance(width, Mapping):
        raise OptionError(
            "budget='global' and a width for each pattern contradict each other",
            why="a global budget decides how wide each group is",
            how="pass one width for all groups, or leave budget out",
        )
    if score == "obs":
        raise OptionError(
            "budget='global' does not work with score 'obs'",
            why="it ranks units within one group, so groups cannot be compared",
            how="use another score, such as score='l2'",
        )


def spread(
    graph: CouplingGraph, states: Sequence[State], options: Options, round_to: int
) -> Callable[[Sizes], Sizes]:
    """From sizes at which every group is equally wide to those of a global budget.

    A unit's score counts relative to the mean over all members' units of its group. Of all groups
    together the best units are kept, as many as before, and of each group the best one.
    """
    alive = {
        member: {g.name: np.arange(g.n_units) for g in graph.of_member(member).groups}
        for member in range(len(states))
    }
    scores = score_units(graph.trunk(), states, options, alive)
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
            found[group.name] = units_at(graph, group, len(states), width, round_to)
        return found

    return wider_where_it_matters


def best_of_all(values: Mapping[str, NDArray[np.float64]], count: int) -> Sizes:
    """How many units of each group are among the best of all groups.

    Args:
        values: For each group, the scores of all its units, float64 [n], not negative.
        count: How many are kept in all; at least one for each group.
    """
    relative = {name: each / (each.mean() or 1.0) for name, each in values.items()}
    # The best of each group stays, whatever the others have.
    rest = {name: np.sort(each)[::-1][1:] for name, each in relative.items()}
    owner = np.repeat(np.arange(len(rest)), [len(each) for each in rest.values()])
    order = np.argsort(-np.concatenate([*rest.values(), np.empty(0)]), kind="stable")
    chosen = owner[order[: max(count - len(rest), 0)]]
    return {name: 1 + int((chosen == number).sum()) for number, name in enumerate(rest)}
