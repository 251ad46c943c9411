"""Which lowerings pay on which device: the one place that knows about speed.

Every other file only knows what is correct. Figures: docs/adr/0013-stack-forms.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from fxfuse.rules import concrete_shape


@dataclass(frozen=True)
class Policy:
    """What pays on one type of device.

    Attributes:
        copied: Largest activation in bytes, of all members at the example's sizes, that is copied
            into one tensor so that the next layer can be one call.
        wide_convolution: Whether a convolution of an input that all members share is one
            convolution with all their output channels also where its windows overlap.
    """

    copied: int
    wide_convolution: bool

    def pays_copy(self, node: fx.Node, n_members: int) -> bool:
        """Whether the members' values of a node may be copied into one tensor."""
        tensor = node.meta["val"]
        size = math.prod(concrete_shape(tensor)) * tensor.element_size()
        return n_members * size <= self.copied

    def pays_wide(self, kernel: Sequence[int], stride: Sequence[int]) -> bool:
        """Whether a convolution of a shared input is made wide."""
        return self.wide_convolution or list(kernel) == list(stride)


#: Measured on 2 cores of an AMD EPYC, one thread, four members. A linear layer as `baddbmm` takes
#: 0.4 to 1.05 times as long as one after the other, the less the smaller it is. What is saved is a
#: few microseconds a call, as long as it takes to copy some hundred kilobytes. Grouped convolutions
#: take 0.5 to 3 times as long as separate ones, depending on sizes that no simple rule describes,
#: so convolutions stay separate. A wide first convolution is followed by separate ones that must
#: copy its channels apart, which eats what it gains, unless it cuts patches for linear layers.
_CPU = Policy(copied=256 * 1024, wide_convolution=False)

#: By type of device. None but the CPU was measured: others are treated like it.
_POLICIES: Mapping[str, Policy] = {"cpu": _CPU}


def policy_of(device: torch.device) -> Policy:
    """The policy of a device."""
    return _POLICIES.get(device.type, _CPU)
