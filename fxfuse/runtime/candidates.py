"""The forms in which a network may be compiled: which is fastest, by rule or by measurement."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import fx, nn

from fxfuse.ensemble.members import INVENTORY
from fxfuse.graph.operator_facts import FACTS, Contraction

#: Devices on which inductor's constant weights were measured to be faster (docs/performance.md),
#: and the floating-point operations of a call from which on: below, the libraries that take packed
#: weights spend longer on being called than on computing.
_FREEZES = {"cpu": 10e6}
#: Devices that were measured, and the floating-point operations of one layer, in the mean, from
#: which on constant weights always were faster than what plain `torch.compile` makes.
_CLEAR = {"cpu": 10e6}


class Candidate(NamedTuple):
    """A form in which a network may run.

    Attributes:
        freeze: Whether inductor keeps the weights as constants, in the layout that suits it.
        channels_last: Whether two-dimensional convolutions run with channels innermost.
        passes: Whether dropout is removed and batch norms are folded.
        compiled: Whether `torch.compile` has a part in it.
    """

    freeze: bool = False
    channels_last: bool = False
    passes: bool = True
    compiled: bool = True

    @property
    def name(self) -> str:
        """What the report calls it."""
        if not self.compiled:
            return "eager"
        said = {"frozen": self.freeze, "channels last": self.channels_last}
        words = ", ".join(word for word, true in said.items() if true)
        return words or ("folded" if self.passes else "plain")


#: What `torch.compile` makes of the network as it is.
PLAIN = Candidate(passes=False)
#: After the passes, without a compiler.
EAGER = Candidate(compiled=False)
#: What `tune` chooses among.
ALL = (Candidate(freeze=True), Candidate(channels_last=True), Candidate(), PLAIN, EAGER)


def by_rule(
    device: torch.device, operations: int, freeze: bool | None, channels_last: bool | None
) -> Candidate:
    """Return the form that device and number of operations suggest, where none was asked for.

    Channels are last by default where weights are not frozen, since inductor chooses the layout of
    those itself.
    """
    if freeze is None:
        least = _FREEZES.get(device.type)
        freeze = least is not None and operations >= least
    return Candidate(freeze, not freeze if channels_last is None else channels_last)


def worth_measuring(
    module: fx.GraphModule, operations: int, rule: Candidate, *, is_known: bool
) -> list[Candidate]:
    """Return the forms that may be the fastest, the one by rule first.

    Plain `torch.compile` may win where calls cost more than computing, and where nothing is known.
    A stack was written to be fast as it is, so that it may win, too.

    Args:
        module: The network.
        operations: Floating-point operations of a call.
        rule: The form that they suggest.
        is_known: Whether it computes in the precision of what was measured, float32.
    """
    layers = sum(isinstance(FACTS.get(n.target), Contraction) for n in module.graph.nodes)
    clear = _CLEAR.get(device_of(module).type)
    is_clear = is_known and clear is not None and operations >= clear * max(layers, 1)
    found = [rule] if is_clear else [rule, PLAIN]
    return [*found, EAGER] if INVENTORY in module.meta else found


def device_of(module: nn.Module) -> torch.device:
    """Return where a network is; one without tensors counts as on the CPU."""
    tensors = (*module.parameters(), *module.buffers())
    return tensors[0].device if tensors else torch.device("cpu")
