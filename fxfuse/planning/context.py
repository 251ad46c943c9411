"""What a method and a score may look at besides the analysis and the members' tensors."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from fxfuse.activations.calibration import CalibrationBatches
from fxfuse.activations.gradients import Gradients
from fxfuse.analysis.coupling import CouplingGroup

#: A member's tensors by name.
State = Mapping[str, torch.Tensor]
#: A member by its number, or the mean of the others.
Reference = int | Literal["mean"]


@dataclass(frozen=True)
class Context:
    """What a method and a score may look at.

    Attributes:
        base_member: The member that keeps what is frozen inside the network.
        sizes: Units of each fused group, by its name. None: as many as a member has.
        absent: Tensors that some members lack → the numbers of these members.
        calibration: Inputs on which members are measured where a method or score needs it.
        activations: For each group, for each member, the activations of its units on the
            calibration inputs, float32 [rows, n_units]; rows correspond across members. None:
            measured.
        gradients: For each member, the gradients of the loss on labelled calibration inputs. None:
            measured.
    """

    base_member: int = 0
    sizes: Mapping[str, int] | None = None
    absent: Mapping[str, Collection[int]] = field(default_factory=dict)
    calibration: CalibrationBatches | None = field(default=None, repr=False)
    activations: Mapping[str, Sequence[torch.Tensor]] | None = field(default=None, repr=False)
    gradients: Sequence[Gradients] | None = field(default=None, repr=False)

    def size_of(self, group: CouplingGroup) -> int:
        """Return how many units a fused group is to have."""
        return group.n_units if self.sizes is None else self.sizes[group.name]
