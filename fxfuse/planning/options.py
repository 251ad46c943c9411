"""What a fusion method and a score may be told."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from fxfuse.activations.calibration import Calibration
from fxfuse.activations.gradients import Gradients
from fxfuse.analysis.coupling import CouplingGroup

#: A member's tensors by name.
State = Mapping[str, torch.Tensor]

#: A member by its number, or the mean of the others.
Reference = int | Literal["mean"]


@dataclass(frozen=True)
class Options:
    """What a method and a score may be told.

    Attributes:
        score: Name of the importance score.
        variant: Name of a variant of the method, or None.
        base_member: The member that keeps what is frozen inside the network, and of which
        `fraction`
            speaks.
        fraction: For `transplant`: the share of each group's units that come from other members
            than the base member, in [0, 1], for all groups or by pattern of the tensors that
            groups are named after; None leaves it to the score.
        reference: For alignment: the member that the others are aligned to, or "mean": each of
            them to the mean of the others, in turn.
        regularisation: For `optimal_transport`: entropic regularisation (Sinkhorn), in units of the
            mean cost; None is exact.
        calibration: Inputs on which members are measured where a method or score needs it.
        activations: For each group, for each member, what its units answer to the calibration
            inputs, float32 [rows, n_units]; rows correspond across members. None: measured.
        gradients: For each member, the gradients of the loss on labelled calibration inputs. None:
            measured.
        sizes: Units of each fused group, by its name. None: as many as a member has.
        absent: Tensors that some members lack → the numbers of these members.
    """

    score: str = "l2"
    variant: str | None = None
    base_member: int = 0
    fraction: float | Mapping[str, float] | None = None
    reference: Reference = 0
    regularisation: float | None = None
    calibration: Calibration | None = field(default=None, repr=False, compare=False)
    activations: Mapping[str, Sequence[torch.Tensor]] | None = field(
        default=None, repr=False, compare=False
    )
    gradients: Sequence[Gradients] | None = field(default=None, repr=False, compare=False)
    sizes: Mapping[str, int] | None = field(default=None, compare=False)
    absent: Mapping[str, Collection[int]] = field(default_factory=dict, compare=False)

    def size_of(self, group: CouplingGroup) -> int:
        """How many units a fused group is to have."""
        return group.n_units if self.sizes is None else self.sizes[group.name]
