"""How weights and images lie: which way is fastest for a network, by rule or by measurement."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

#: Devices on which inductor's constant weights were measured to be faster (docs/performance.md),
#: and the floating-point operations of a call from which on: below, the libraries that take packed
#: weights spend longer on being called than on computing.
_FREEZES = {"cpu": 10e6}


class Layout(NamedTuple):
    """How weights and images lie.

    Attributes:
        freeze: Whether inductor keeps the weights as constants, in the layout that suits it.
        channels_last: Whether two-dimensional convolutions run with channels innermost.
    """

    freeze: bool
    channels_last: bool


#: What a measurement chooses among.
LAYOUTS = (Layout(True, False), Layout(False, True), Layout(False, False))


def by_rule(
    device: torch.device, operations: int, freeze: bool | None, channels_last: bool | None
) -> Layout:
    """Return the layout that device and number of operations suggest, where none was asked for.

    Channels are last by default where weights are not frozen, since inductor chooses the layout of
    those itself.
    """
    if freeze is None:
        least = _FREEZES.get(device.type)
        freeze = least is not None and operations >= least
    return Layout(freeze, not freeze if channels_last is None else channels_last)


def device_of(module: nn.Module) -> torch.device:
    """Return where a network is; one without tensors counts as on the CPU."""
    tensors = (*module.parameters(), *module.buffers())
    return tensors[0].device if tensors else torch.device("cpu")
