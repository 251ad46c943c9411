"""Concatenation: every unit of every member, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fxfuse.analysis.coupling import CouplingGraph
from fxfuse.planning.context import Context, State
from fxfuse.planning.methods.registry import Method, method
from fxfuse.planning.plan import UnitMap


@method("concatenate")
@dataclass(frozen=True)
class Concatenate(Method):
    """M = U = identity on all units of all members.

    Copies of a unit stand next to each other: fused unit u·N + i is unit u of member i, where all
    members have as many units.
    """

    any_size: ClassVar[bool] = True

    @property
    def weights_only(self) -> bool:
        """Whether it looks at weights only: always."""
        return True

    def maps(
        self, graph: CouplingGraph, states: Sequence[State], context: Context
    ) -> tuple[UnitMap, ...]:
        """Make the maps."""
        maps = []
        for group in graph.groups:
            sizes = [graph.units_of(group.name, member) for member in range(len(states))]
            member = np.repeat(np.arange(len(states)), sizes)
            unit = np.concatenate([np.arange(size) for size in sizes])
            order = np.lexsort((member, unit))
            target = np.arange(len(order))
            maps.append(UnitMap(group.name, len(order), target, member[order], unit[order]))
        return tuple(maps)
