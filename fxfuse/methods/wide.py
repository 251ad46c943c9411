"""Concatenation: every unit of every member, side by side."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fxfuse.coupling import CouplingGraph
from fxfuse.methods.registry import check_variant, method
from fxfuse.options import Options, State
from fxfuse.plan import UnitMap


@method("wide")
def wide(graph: CouplingGraph, states: Sequence[State], options: Options) -> tuple[UnitMap, ...]:
    """M = U = identity on all units of all members.

    Copies of a unit stand next to each other: fused unit u·N + i is unit u of member i.
    """
    check_variant("wide", options, ())
    n = len(states)
    return tuple(
        UnitMap(
            group.name,
            group.n_units * n,
            np.arange(group.n_units * n),
            np.tile(np.arange(n), group.n_units),
            np.repeat(np.arange(group.n_units), n),
        )
        for group in graph.groups
    )
