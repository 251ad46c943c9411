"""The way back from a trained network to its start: how far to go until there is no harm done.

Notation of shapes: p inputs that judge, * any further dimensions.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fxfuse.refine.batch import call, logits_of
from fxfuse.refine.distance import check_shapes, distance, relative_error
from fxfuse.refine.outputs import Outputs
from fxfuse.refine.parallel import reshard, together
from fxfuse.refine.pool import Pool

#: Points between the start and the end that are tried: shares of the way to the end.
_POINTS = (0.5, 0.25)


@dataclass(frozen=True)
class Judges:
    """Inputs that nothing is trained on, and what the ensemble answers to them.

    Attributes:
        pool: The inputs and answers.
        kind: Kind of the outputs.
        batch: Inputs per forward pass.
    """

    pool: Pool
    kind: Outputs
    batch: int

    def measure(self, module: nn.Module) -> tuple[float, float]:
        """Distance and relative error of a network in eval mode; the same on all processes."""
        wanted, several = self.pool.targets, together(module)
        with torch.no_grad():
            chunks = zip(*(tensor.split(self.batch) for tensor in self.pool.inputs), strict=True)
            answers = torch.cat([logits_of(call(module, chunk)) for chunk in chunks])
        reshard(module)
        check_shapes(answers, wanted)
        answers = answers.to(wanted.dtype)
        found = [distance(answers, wanted, self.kind), relative_error(answers, wanted, self.kind)]
        told = torch.tensor(found, dtype=torch.float64, device=wanted.device)
        far, error = several.mean(told).tolist()
        return far, error


class Start:
    """A network before training, to which it can go back; holds a copy of its tensors."""

    def __init__(self, module: nn.Module, judges: Judges) -> None:
        self._module, self._judges = module, judges
        self._tensors = _copies(module)
        begin = time.process_time()
        #: How far it is from the ensemble, and its error relative to how the answers vary.
        self.distance, self.error = judges.measure(module)
        #: CPU seconds that `settle` takes at most, about.
        self.seconds = (1 + len(_POINTS)) * (time.process_time() - begin)

    def settle(self) -> tuple[float, float]:
        """Leave the network, in eval mode, at the last point of the way that is closer than this.

        The way is the straight line between the tensors of start and end (Wortsman et al., "Robust
        fine-tuning of zero-shot models", arXiv:2109.01903); running statistics are tensors of it.
        The last point, not the closest one: what is trained after that still learns from the
        inputs, which the distance from the ensemble does not show.

        Returns:
            The distance of that point, and its share of the way: 1 is the end, 0 the start.
        """
        end = _copies(self._module)
        for share in (1.0, *_POINTS):
            self._go(end, share)
            far, _ = self._judges.measure(self._module)
            if far < self.distance:
                return far, share
        self._go(end, 0.0)
        return self.distance, 0.0

    def _go(self, end: list[Tensor], share: float) -> None:
        """Set all tensors to a point of the way; counters are those of its end but at the start."""
        with torch.no_grad():
            for tensor, first, last in zip(_tensors(self._module), self._tensors, end, strict=True):
                if share in (0.0, 1.0) or not tensor.is_floating_point():
                    tensor.copy_(last if share else first)
                else:
                    tensor.copy_(first + share * (last - first))


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _copies(module: nn.Module) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in _tensors(module)]
