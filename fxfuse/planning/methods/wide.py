"""Concatenation: every unit of every member, side by side."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fxfuse.analysis.coupling import CouplingGraph
from fxfuse.planning.methods.registry import check_variant, method
from fxfuse.planning.options import Options, State
from fxfuse.planning.plan import UnitMap


@method("wide")
def wide(graph: CouplingGraph, states: Sequence[State], options: Options) -> tuple[UnitMap, ...]:
    """M = U = identity on all units of all members.

    Copies of a unit stand next to each other: fused unit u·N + i is unit u of member i, where all
    members have as many units.
    """
    check_variant("wide", options, ())
    maps = []
    for group in graph.groups:
        sizes = [graph.units_of(group.name, member) for member in range(len(states))]
        member = np.repeat(np.arange(len(states)), sizes)
        unit = np.concatenate([np.arange(size) for size in sizes])
        order = np.lexsort((member, unit))
        target = np.arange(len(order))
        maps.append(UnitMap(group.name, len(order), target, member[order], unit[order]))
    return tuple(maps)
