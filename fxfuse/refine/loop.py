"""The training loop itself, whatever the loss: (batch → loss → step)*, progress and checks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fxfuse.errors import OptionError
from fxfuse.graph.torch_compat import pytree
from fxfuse.refine.modes import seeded
from fxfuse.refine.parallel import together
from fxfuse.refine.stream import BatchStream
from fxfuse.refine.watch import READ_EVERY, bar, check_weights, last_finite

if TYPE_CHECKING:
    from rich.progress import Progress


@dataclass(frozen=True)
class RefineReport:
    """What a training run did.

    Attributes:
        steps: Optimiser steps in all.
        losses: Loss of every step; the mean over all processes where several train one network.
        seconds: Wall time of this call.
    """

    steps: int
    losses: tuple[float, ...]
    seconds: float

    @property
    def first_loss(self) -> float:
        """Loss of the first step."""
        return self.losses[0]

    @property
    def last_loss(self) -> float:
        """Loss of the last step."""
        return self.losses[-1]


@dataclass(frozen=True)
class Run:
    """Everything that stays the same during one run."""

    module: nn.Module
    batch_loss: Callable[[Any], Tensor]
    batches: Iterable[Any]
    steps: int
    optimizer: Optimizer
    scheduler: LRScheduler | None
    device: torch.device
    progress: bool | Progress
    label: str
    seed: int


def train(run: Run) -> RefineReport:
    """Train `run.module` in place, and leave it in eval mode."""
    if run.steps < 1:
        raise OptionError(
            f"steps must be at least 1, got {run.steps}",
            where="steps",
            why="a run counts in whole steps, and takes at least one",
            how="pass steps=1 or more",
        )
    started = time.perf_counter()
    run.module.to(run.device)
    losses = torch.zeros(run.steps, device=run.device)
    with seeded(run.seed, run.device), bar(run.progress, run.label, run.steps) as advance:
        stream = BatchStream(run.batches, run.seed)
        try:
            run.module.train()
            _steps(run, stream, losses, advance)
        finally:
            run.module.eval()
    seconds = time.perf_counter() - started
    return RefineReport(run.steps, tuple(losses.tolist()), seconds)


def _steps(
    run: Run,
    stream: BatchStream,
    losses: Tensor,
    advance: Callable[[float, float], None],
) -> None:
    """Take the steps, writing the loss of each into `losses` `[steps]`."""
    read = 0
    several = together(run.module)
    for step in range(run.steps):
        batch = pytree.tree_map_only(
            Tensor, lambda tensor: tensor.to(run.device, non_blocking=True), stream.next()
        )
        run.optimizer.zero_grad(set_to_none=True)
        loss = run.batch_loss(batch)
        loss.backward()
        run.optimizer.step()
        if run.scheduler is not None:
            run.scheduler.step()
        losses[step] = several.mean(loss.detach())
        done = step + 1
        if done % READ_EVERY == 0 or done == run.steps:
            advance(done, last_finite(losses[read:done], read))
            read = done
    check_weights(run.module)
