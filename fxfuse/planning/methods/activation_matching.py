"""Averaging after alignment by activations."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fxfuse.analysis.coupling import CouplingGraph
from fxfuse.planning.measured import matrix_of, require_activations
from fxfuse.planning.methods._alignment import (
    Features,
    Orders,
    averaged,
    best_order,
    common_orders,
    frame_of,
    surplus_of,
)
from fxfuse.planning.methods._correlation import standardised
from fxfuse.planning.methods.registry import check_variant, method
from fxfuse.planning.options import Options, State
from fxfuse.planning.plan import UnitMap

#: A correlation below this is rounding.
_NOTHING = 1e-9


@method("activation_matching")
def activation_matching(
    graph: CouplingGraph, states: Sequence[State], options: Options
) -> tuple[UnitMap, ...]:
    """Matches the units of every member to those of the reference that answer alike, and averages.

    The assignment of largest total correlation over the calibration inputs (Li et al., "Convergent
    Learning", arXiv:1511.07543; "Git Re-Basin", arXiv:2209.04836, section 3.1). A unit that answers
    the same to all inputs correlates with nothing.

    Members of different widths: the assignments are rectangular, and what does not correlate
    positively is no pair. A unit of a wider member that is left over writes nothing, and is read
    off the unit of its own member that tells most of it, by least squares on their activations.
    """
    check_variant("activation_matching", options, ())
    activations = require_activations(graph, states, options, "method 'activation_matching'")

    frame = graph.of_member(frame_of(graph, len(states), options))

    def features(member: int) -> Features:
        return {name: standardised(matrix_of(t[member])) for name, t in activations.items()}

    def align(target: Features, member: int, start: Orders | None) -> Orders:
        orders = {}
        for name, found in features(member).items():
            similarity = target[name].T @ found
            order = best_order(similarity, start[name] if start else None)
            if graph.of_member(member) is not frame:
                pairs = similarity[np.arange(len(order)), order] > _NOTHING
                order = np.where((order >= 0) & pairs, order, -1)
            orders[name] = order
        return orders

    orders = common_orders(graph, features, len(states), options, align, _reorder)
    if not graph.members:
        return averaged(frame, orders)
    surplus = [
        {
            name: surplus_of(matrix_of(found[member]).T, order[name], opposite=True)
            for name, found in activations.items()
        }
        for member, order in enumerate(orders)
    ]
    return averaged(frame, orders, surplus)


def _reorder(found: Features, member: int, orders: Orders) -> Features:
    return {
        name: np.where(orders[name] >= 0, units[:, orders[name]], 0.0)
        for name, units in found.items()
    }
