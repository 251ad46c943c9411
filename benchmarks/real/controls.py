"""What a fused network is compared with: single members, members side by side, plain distillation.

Probabilities have their classes along dimension 1, `[n, k, *]`; `*` are positions, if any.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fxfuse.refine.judge import CONFIDENCE, resampled

_RESAMPLES = 2000
_LEAST = torch.finfo(torch.float32).tiny
RATE = 1e-4


def outputs_of(network: nn.Module, inputs: Tensor, *, batch: int, logits: bool = False) -> Tensor:
    """Return a network's probabilities `[n, k, *]` for inputs `[n, *]`.

    Args:
        network: In evaluation mode.
        inputs: All inputs.
        batch: How many are run at once.
        logits: Whether the network returns logits rather than probabilities.
    """
    with torch.no_grad():
        outputs = torch.cat([network(part) for part in inputs.split(batch)])
    return outputs.softmax(1) if logits else outputs


def mean_of(probabilities: Sequence[Tensor]) -> Tensor:
    """Return the ensemble of members' probabilities."""
    return torch.stack(list(probabilities)).mean(0)


def kl(target: Tensor, found: Tensor) -> float:
    """Return KL(target ‖ found) in nats, the mean over inputs and positions."""
    return float(kl_of_each(target, found).mean())


def kl_of_each(target: Tensor, found: Tensor) -> Tensor:
    """Return KL(target ‖ found) in nats of each input, the mean over its positions, `[n]`."""
    target, found = target.double(), found.double()
    terms = target * (target.clamp_min(_LEAST).log() - found.clamp_min(_LEAST).log())
    return terms.sum(1).reshape(len(terms), -1).mean(1)


def accuracy(probabilities: Tensor, labels: Tensor) -> float:
    """Return the share of right classes in percent."""
    return 100 * float(right(probabilities, labels).mean())


def right(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Return of which inputs the class is right: 1 or 0, float64 `[n]`."""
    return (probabilities.argmax(1) == labels).double()


def interval(differences: Tensor) -> list[float]:
    """Mean of paired differences `[n]`, and the ends of its bootstrap interval."""
    drawn = resampled(differences.double()[:, None], _RESAMPLES)[:, 0]
    ends = torch.tensor([(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], dtype=drawn.dtype)
    return [float(differences.mean()), *drawn.quantile(ends).tolist()]


def best_member(probabilities: Sequence[Tensor]) -> int:
    """Return the index of the member that is closest to the ensemble on calibration inputs."""
    return greedy_best(probabilities, 1)[0]


def greedy_best(probabilities: Sequence[Tensor], count: int) -> tuple[int, ...]:
    """Choose members whose mean is close to the ensemble, one after the other.

    Args:
        probabilities: Each member's on calibration inputs.
        count: How many to choose.
    """
    ensemble = mean_of(probabilities)
    chosen: tuple[int, ...] = ()
    for _ in range(count):
        chosen = min(
            ((*chosen, i) for i in range(len(probabilities)) if i not in chosen),
            key=lambda tried: kl(ensemble, mean_of([probabilities[i] for i in tried])),
        )
    return chosen


def distil(
    network: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    *,
    seconds: float,
    batch: int,
    logits: bool = False,
    seed: int = 0,
) -> tuple[nn.Module, int]:
    """Train a copy of a network towards an ensemble's probabilities: Adam, 1e-4 with a cosine.

    Batch norms keep their statistics. Nothing is held out: this is the loop that a user writes.

    Args:
        network: The best member.
        inputs: `[n, *]`.
        targets: The ensemble's probabilities `[n, k, *]`.
        seconds: CPU seconds, all threads together; the rate falls to zero at their end.
        batch: How many inputs a step takes.
        logits: Whether the network returns logits rather than probabilities.
        seed: Seed of the order of the inputs.

    Returns:
        The trained copy in evaluation mode, and how many steps it took.
    """
    network = copy.deepcopy(network).eval()
    optimiser = torch.optim.Adam(network.parameters(), RATE)
    generator = torch.Generator().manual_seed(seed)
    start, steps = time.process_time(), 0
    order = torch.empty(0, dtype=torch.int64)
    while (share := (time.process_time() - start) / seconds) < 1:
        for group in optimiser.param_groups:
            group["lr"] = RATE * (1 + math.cos(math.pi * share)) / 2
        if len(order) < batch:
            order = torch.cat([order, torch.randperm(len(inputs), generator=generator)])
        chosen, order = order[:batch], order[batch:]
        outputs = network(inputs[chosen])
        logs = outputs.log_softmax(1) if logits else outputs.clamp_min(_LEAST).log()
        loss = -(targets[chosen] * logs).sum(1).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        steps += 1
    return network, steps
