"""Units and coupling groups: neurons that move together, and units that are interchangeable."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fxfuse.analysis.coupling_constraints import CouplingConstraints
from fxfuse.analysis.labels import Index, Place
from fxfuse.graph.capture import Program


@dataclass(frozen=True)
class CouplingGroup:
    """Units that are interchangeable.

    Attributes:
        name: The first place of the group, as `tensor:dim`.
        n_units: Number of units.
        index: For each place, which indices each unit owns there, int64 [n_units, slots_per_unit].
    """

    name: str
    n_units: int
    index: Mapping[Place, Index]

    def slots(self) -> int:
        """Return the number of slots of one unit, over all places."""
        return sum(rows.shape[1] for rows in self.index.values())


def form_groups(
    program: Program,
    coupling: CouplingConstraints,
    component: Index,
    frozen: NDArray[np.bool_],
) -> tuple[CouplingGroup, ...]:
    """Group free components, which are units, by their structure.

    `component` is that of each id, `frozen` bool [components].
    """
    parts = coupling.slots(component, frozen)
    structure = coupling.structure(component, parts, frozen)
    owners = [(p, n) for n, p in enumerate(coupling.owners) if not p[0].startswith("<")]
    places = [(p, coupling.ids_of(owner)) for p, owner in owners]
    appeared = np.full(len(frozen), len(places))
    for number, (_, ids) in reversed(list(enumerate(places))):
        appeared[component[ids]] = number
    appeared[frozen] = len(places)
    units = np.flatnonzero(appeared < len(places))
    units = units[np.argsort(appeared[units], kind="stable")]
    _, first, group = np.unique(structure[units], return_index=True, return_inverse=True)
    # Groups are numbered in the order in which their first unit appears.
    group = np.argsort(np.argsort(first))[group]
    sizes = np.bincount(group, minlength=len(first))
    group_of, unit_of = np.full(len(frozen), -1), np.full(len(frozen), -1)
    group_of[units] = group
    together = np.argsort(group, kind="stable")
    unit_of[units[together]] = np.arange(len(units)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    aliases = defaultdict(list)
    for name, canonical in program.canonical.items():
        aliases[canonical].append(name)
    indexes: list[dict[Place, Index]] = [{} for _ in sizes]
    for (name, dim), ids in places:
        owned = group_of[component[ids]]
        # Slots of two units correspond when they play the same part, whatever their index.
        order = np.lexsort((parts[ids], unit_of[component[ids]], owned))
        numbers, starts = np.unique(owned[order], return_index=True)
        for number, rows in zip(numbers, np.split(order, starts[1:]), strict=True):
            if number >= 0:
                for alias in aliases[name]:
                    indexes[number][(alias, dim)] = rows.reshape(sizes[number], -1)
    groups, taken = [], set[str]()
    for n_units, index in zip(sizes.tolist(), indexes, strict=True):
        leader = next(iter(index))
        name = f"{leader[0]}:{leader[1]}"
        number = 2
        while name in taken:
            name = f"{leader[0]}:{leader[1]}#{number}"
            number += 1
        taken.add(name)
        groups.append(CouplingGroup(name, n_units, index))
    return tuple(groups)
