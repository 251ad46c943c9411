"""What places of the fused network should be: one run of each member, of which rows are kept.

Notation of shapes: n rows of all batches together, c channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Any

import torch
from torch import fx

from fxfuse.activations import NodeRunner
from fxfuse.activations.calibration import count_rows
from fxfuse.activations.spill_store import SpillStore, Stored
from fxfuse.refine.regression.place import Place
from fxfuse.refine.regression.sensitivity import Sensitivity, drawn
from fxfuse.refine.targets import Targets
from fxfuse.refine.task import Classification


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
        scores: Of each batch, how much the task depends on each of the rows, float32 [rows].
        ratios: Of each batch, how many rows each of the rows stands for, but for a factor.
        combined: Of each batch, what the members answer there together, for the last layer of a
            classifier: float32 [rows, classes].
    """

    place: Place
    by_rows: bool
    chosen: list[torch.Tensor] = field(default_factory=list)
    shapes: list[torch.Size] = field(default_factory=list)
    values: Sequence[Any] | None = field(default_factory=list)
    scores: list[torch.Tensor] = field(default_factory=list)
    ratios: list[torch.Tensor] = field(default_factory=list)
    combined: list[torch.Tensor] = field(default_factory=list)


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
        sensitivity: Says how much the task depends on each row; None: rows are all alike.
    """

    def __init__(
        self,
        members: Sequence[NodeRunner],
        targets: Targets,
        limits: Mapping[Place, int],
        combine: Mapping[Place, Classification],
        seed: int,
        memory: int,
        sensitivity: Sensitivity | None = None,
    ) -> None:
        self._targets, self._combine = targets, combine
        self._limits, self._store = limits, SpillStore(memory)
        self._sensitivity, self._scores = sensitivity, dict[Place, torch.Tensor]()
        self._generators = {
            place: torch.Generator().manual_seed(seed + number)
            for number, place in enumerate(limits)
        }
        self.aims = {place: Aim(place, self._is_by_rows(place)) for place in limits}
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

        known: dict[Place, torch.Tensor] = {}
        if self._sensitivity is not None:
            self._scores, known = self._sensitivity.scores(members[0], batch, list(self.aims))
        for place, value in known.items():
            found[place].append(self._kept(place, value, batch, share))
        with torch.no_grad():
            for member in members[bool(known) :]:
                member.once(batch, by_node, take)
        for place, values in found.items():
            self._merge(place, values)

    def _kept(self, place: Place, value: torch.Tensor, batch: int, share: float) -> torch.Tensor:
        """Of one member's value, the rows that are chosen, or all of it."""
        aim = self.aims[place]
        if len(aim.chosen) == batch:
            channels = place.channels if place.straight else -1
            count = value.numel() // value.shape[channels]
            take = min(ceil(self._limits[place] * share), count)
            generator, scores = self._generators[place], self._scores.get(place)
            if scores is None or len(scores) != count:
                chosen = torch.randperm(count, generator=generator)[:take]
                scores = ratios = torch.ones(count)
            else:
                chosen, ratios = drawn(scores, take, generator)
            chosen = chosen.sort().values
            aim.chosen.append(chosen)
            aim.shapes.append(value.shape)
            aim.scores.append(scores[chosen])
            aim.ratios.append(ratios[chosen])
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
