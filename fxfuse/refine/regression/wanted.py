"""What places of the fused network should be: one run of each member, of which rows are kept.

Notation of shapes: n rows of all batches together, c channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxfuse.activations import NodeRunner
from fxfuse.activations.calibration import count_rows
from fxfuse.activations.spill_store import SpillStore, Stored
from fxfuse.refine.targets import Targets
from fxfuse.refine.task import Classification


@dataclass(frozen=True)
class Place:
    """Where a value is aimed at.

    Attributes:
        node: The node of the fused network's graph.
        channels: Dimension of its value that counts channels; all others count rows.
        straight: Whether its rows are those of the layer that is fitted, one to one.
    """

    node: fx.Node
    channels: int
    straight: bool = True

    def rows(self, value: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """The chosen rows of a value of the node, [rows, channels]."""
        last = value.movedim(self.channels, -1)
        chosen = chosen.to(value.device)
        if last.is_contiguous():
            return last.reshape(-1, last.shape[-1])[chosen]
        # A reshape would copy the whole value.
        return last[torch.unravel_index(chosen, last.shape[:-1])]


@dataclass
class Aim:
    """What a place should be on all calibration inputs.

    Attributes:
        place: The place.
        by_rows: Whether rows of it are known; else its whole value is.
        chosen: Of each batch, which rows, int64.
        shapes: Of each batch, the shape of the whole value.
        values: Of each batch the rows, float32 [rows, channels], or the whole value; None where no
            member has it.
        combined: Of each batch, what the members answer there together, for the last layer of a
            classifier: float32 [rows, classes].
    """

    place: Place
    by_rows: bool
    chosen: list[torch.Tensor]
    shapes: list[torch.Size]
    values: Sequence[Any] | None
    combined: list[torch.Tensor]


class Wanted:
    """Runs the members, batch by batch, and keeps what the fused network should be.

    Memory does not grow with the number of members or of inputs: of each place, about as many rows
    are kept as a regression looks at, and what does not fit into `memory` is in a temporary folder.

    Args:
        members: The members.
        targets: Merges their values.
        limits: The places, each with how many rows are kept, about.
        combine: For the last layers of a classifier, how its members' logits are combined.
        seed: Seed of the choice of rows.
        memory: Bytes that stay in memory.
    """

    def __init__(
        self,
        members: Sequence[NodeRunner],
        targets: Targets,
        limits: Mapping[Place, int],
        combine: Mapping[Place, Classification],
        seed: int,
        memory: int,
    ) -> None:
        self._targets, self._combine = targets, combine
        self._limits, self._store = limits, SpillStore(memory)
        self._generators = {
            place: torch.Generator().manual_seed(seed + number)
            for number, place in enumerate(limits)
        }
        self.aims = {place: Aim(place, self._is_by_rows(place), [], [], [], []) for place in limits}
        batches = members[0].calibration.batches
        sizes = [count_rows(batch) for batch in batches]
        for batch in range(len(batches)):
            self._add(members, batch, sizes[batch] / sum(sizes))
        for aim in self.aims.values():
            if aim.values is not None:
                aim.values = Stored(self._store, list(aim.values))

    def _is_by_rows(self, place: Place) -> bool:
        return place.straight and self._targets.is_along(place.node, place.channels)

    def _add(self, members: Sequence[NodeRunner], batch: int, share: float) -> None:
        """Run one batch through all members."""
        by_node: dict[fx.Node, list[Place]] = {}
        for place in self.aims:
            by_node.setdefault(place.node, []).append(place)
        found: dict[Place, list[torch.Tensor | None]] = {place: [] for place in self.aims}

        def take(node: fx.Node, value: torch.Tensor | None) -> None:
            for place in by_node[node]:
                kept = None if value is None else self._kept(place, value, batch, share)
                found[place].append(kept)

        for member in members:
            member.once(batch, by_node, take)
        for place, values in found.items():
            self._merge(place, values)

    def _kept(self, place: Place, value: torch.Tensor, batch: int, share: float) -> torch.Tensor:
        """Of one member's value, the rows that are chosen, or all of it."""
        aim = self.aims[place]
        if len(aim.chosen) == batch:
            channels = place.channels if place.straight else -1
            count = value.numel() // value.shape[channels]
            take = min(-int(-self._limits[place] * share // 1), count)
            order = torch.randperm(count, generator=self._generators[place])[:take]
            aim.chosen.append(order.sort().values)
            aim.shapes.append(value.shape)
        if not aim.by_rows:
            return value.detach().clone()
        return place.rows(value, aim.chosen[batch]).float()

    def _merge(self, place: Place, values: Sequence[torch.Tensor | None]) -> None:
        """Keep the members' values of a batch, as one."""
        aim = self.aims[place]
        merge = self._targets.merge_lines if aim.by_rows else self._targets.merge
        merged = merge(place.node, values)
        if merged is None or aim.values is None:
            aim.values = None
            return
        assert isinstance(aim.values, list)
        aim.values.append(self._store.keep(merged))
        own = [value for value in values if value is not None and value.shape == merged.shape]
        if place in self._combine and aim.by_rows and len(own) == len(values):
            aim.combined.append(self._combine[place].combine(own))
