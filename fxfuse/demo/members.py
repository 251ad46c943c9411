"""How the demo's networks come about: trained members, their average, refined copies.

Validation images choose the learning rate; see `fxfuse.demo.run` for who is compared with whom.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from rich.progress import Progress
from torch import Tensor, nn

from fxfuse.data import Batches, Split, specialist_indices
from fxfuse.demo import measure
from fxfuse.demo.network import SmallResNet
from fxfuse.refine import RefineReport, default_optimizer, finetune

MEMBERS = 4
SETTINGS = ("same data, different seeds", "specialists")

_LEARNING_RATES = (3e-3, 1e-2)
_SHARE_OF_OTHERS = 0.1


@dataclass(frozen=True)
class Refined:
    """The refined network that validation chose, and how it came about."""

    module: nn.Module
    seconds: float
    learning_rate: float


def images_of_member(setting: str, index: int, seed: int, labels: Tensor, parts: Split) -> Tensor:
    """Return the indices of the training images that member `index` sees."""
    if setting != "specialists":
        return parts.train
    own = [label for label in labels.unique().tolist() if label % MEMBERS == index]
    generator = torch.Generator().manual_seed(seed_of(seed, index))
    return specialist_indices(labels, parts.train, own, _SHARE_OF_OTHERS, generator)


def train_member(batches: Batches, steps: int, seed: int, progress: Progress | bool) -> nn.Module:
    """Return a network trained from scratch."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        member = SmallResNet()
    optimizer = torch.optim.SGD(member.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    finetune(
        member,
        batches,
        steps=steps,
        optimizer=optimizer,
        scheduler=schedule,
        progress=progress,
        seed=seed,
    )
    return member


def average(members: Sequence[nn.Module]) -> nn.Module:
    """Return the plain mean of the members' weights; integer buffers are the first member's."""
    states = [member.state_dict() for member in members]
    mean = {
        name: torch.stack([state[name] for state in states]).mean(dim=0)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in states[0].items()
    }
    average = copy.deepcopy(members[0])
    average.load_state_dict(mean)
    return average


def refined(
    start: nn.Module,
    refine: Callable[..., RefineReport],
    batches: Batches,
    steps: int,
    seed: int,
    validation: tuple[Tensor, Tensor],
    progress: Progress | bool,
) -> Refined:
    """Refine a copy of `start` with each learning rate, and return what validation prefers."""
    candidates = []
    for learning_rate in _LEARNING_RATES:
        module = copy.deepcopy(start)
        optimizer, scheduler = default_optimizer(module, steps, learning_rate)
        done = refine(
            module,
            batches,
            steps=steps,
            optimizer=optimizer,
            scheduler=scheduler,
            progress=progress,
            seed=seed,
        )
        candidates.append(Refined(module, done.seconds, learning_rate))
    return max(candidates, key=lambda candidate: merit(candidate.module, validation))


def merit(module: nn.Module, validation: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Return what networks are ranked by: validation accuracy, then low cross-entropy."""
    accuracy, cross_entropy = measure.evaluate(module, *validation)
    return accuracy, -cross_entropy


def seed_of(seed: int, index: int) -> int:
    """Return a seed of its own for each member of each repetition."""
    return 100 * seed + index
