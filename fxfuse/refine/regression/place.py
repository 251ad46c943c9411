"""A place of a network whose value a fit aims at, as rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx


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
