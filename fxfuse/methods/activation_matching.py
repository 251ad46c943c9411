"""Averaging after alignment by activations."""

from __future__ import annotations

from collections.abc import Sequence

from fxfuse.calibrated import matrix_of, require_activations
from fxfuse.coupling import CouplingGraph
from fxfuse.methods._alignment import (
    Features,
    Orders,
    averaged,
    best_order,
    common_orders,
)
from fxfuse.methods._correlation import standardised
from fxfuse.methods.registry import check_variant, method
from fxfuse.options import Options, State
from fxfuse.plan import UnitMap


@method("activation_matching")
def activation_matching(
    graph: CouplingGraph, states: Sequence[State], options: Options
) -> tuple[UnitMap, ...]:
    """Permutes the units of every member to those of the reference that answer alike, and averages.

    The assignment of largest total correlation over the calibration inputs (Li et al., "Convergent
    Learning", arXiv:1511.07543; "Git Re-Basin", arXiv:2209.04836, section 3.1). A unit that answers
    the same to all inputs correlates with nothing.

    Raises:
        CalibrationError: There are no activations, or they do not fit.
        ControlError: There is no such reference member.
        UnknownMethodError: A variant was asked for.
    """
    check_variant("activation_matching", options, ())
    activations = require_activations(graph, states, options, "method 'activation_matching'")

    def features(member: int) -> Features:
        return {name: standardised(matrix_of(t[member])) for name, t in activations.items()}

    orders = common_orders(graph, features, len(states), options, _align, _reorder)
    return averaged(graph, orders)


def _align(target: Features, member: Features, start: Orders | None) -> Orders:
    return {
        name: best_order(target[name].T @ member[name], start[name] if start else None)
        for name in member
    }


def _reorder(member: Features, orders: Orders) -> Features:
    return {name: units[:, orders[name]] for name, units in member.items()}
