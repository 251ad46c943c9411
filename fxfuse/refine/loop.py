"""The training loop itself, whatever the loss: steps, progress, checkpoints, checks.

train: restore? → skip seen batches → (batch → loss → step → checkpoint?)*
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fxfuse.errors import CheckpointError, OptionError
from fxfuse.graph.torch_compat import pytree
from fxfuse.refine import checkpoint as checkpoints
from fxfuse.refine.modes import seeded
from fxfuse.refine.parallel import check_whole, together
from fxfuse.refine.stream import BatchStream
from fxfuse.refine.watch import READ_EVERY, bar, check_weights, last_finite

if TYPE_CHECKING:
    from rich.progress import Progress


@dataclass(frozen=True)
class RefineReport:
    """What a training run did.

    Attributes:
        steps: Optimiser steps in all, those before an interruption included.
        losses: Loss of every step, those before an interruption included; the mean over all
            processes where several train one network.
        seconds: Wall time of this call.
        resumed_at: Steps that were taken over from a checkpoint; 0 for a run from the start.
    """

    steps: int
    losses: tuple[float, ...]
    seconds: float
    resumed_at: int = 0

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
    checkpoint: Path | None
    checkpoint_every: int
    seed: int


def train(run: Run) -> RefineReport:
    """Train `run.module` in place, and leave it in eval mode."""
    _check_counts(run)
    if run.checkpoint is not None:
        check_whole(run.module)
    started = time.perf_counter()
    run.module.to(run.device)
    losses = torch.zeros(run.steps, device=run.device)
    with seeded(run.seed, run.device), bar(run.progress, run.label, run.steps) as advance:
        stream = BatchStream(run.batches, run.seed)
        start = _restore(run, losses)
        stream.skip(start)
        try:
            run.module.train()
            _steps(run, stream, losses, start, advance)
        finally:
            run.module.eval()
    seconds = time.perf_counter() - started
    return RefineReport(run.steps, tuple(losses.tolist()), seconds, resumed_at=start)


def _steps(
    run: Run,
    stream: BatchStream,
    losses: Tensor,
    start: int,
    advance: Callable[[float, float], None],
) -> None:
    """Take the steps from `start` on, writing the loss of each into `losses` `[steps]`."""
    read = start
    several = together(run.module)
    for step in range(start, run.steps):
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
        due = run.checkpoint is not None and done % run.checkpoint_every == 0
        if due or done % READ_EVERY == 0 or done == run.steps:
            advance(done, last_finite(losses[read:done], read))
            read = done
        if due or done == run.steps:
            check_weights(run.module)
        # All processes have the same state, so one writes it, and all of them go on from it.
        if run.checkpoint is not None and (due or done == run.steps) and several.number == 0:
            checkpoints.save(run.checkpoint, _state(run, losses, done))


def _state(run: Run, losses: Tensor, step: int) -> dict[str, Any]:
    random = {"cpu": torch.get_rng_state()}
    if run.device.type == "cuda":
        random["cuda"] = torch.cuda.get_rng_state(run.device)
    return {
        "identity": _identity(run),
        "step": step,
        "losses": losses,
        "module": dict(run.module.state_dict()),
        "optimizer": run.optimizer.state_dict(),
        "scheduler": None if run.scheduler is None else run.scheduler.state_dict(),
        "random": random,
    }


def _identity(run: Run) -> dict[str, Any]:
    """Return what must agree between a checkpoint and the run that goes on from it."""
    return {
        "job": run.label,
        "steps": run.steps,
        "seed": run.seed,
        "optimizer": type(run.optimizer).__name__,
        "scheduler": type(run.scheduler).__name__,
        "device": run.device.type,
    }


def _restore(run: Run, losses: Tensor) -> int:
    """Load the checkpoint, if there is one, and return the number of steps done."""
    if run.checkpoint is None or not run.checkpoint.exists():
        return 0
    state = checkpoints.load(run.checkpoint)
    now = _identity(run)
    then = state.get("identity", {})
    changed = [
        f"{key} was {then.get(key)}, is {now[key]}" for key in now if then.get(key) != now[key]
    ]
    if changed:
        raise _mismatch(run.checkpoint, "; ".join(changed))
    try:
        run.module.load_state_dict(state["module"])
        run.optimizer.load_state_dict(state["optimizer"])
    except (RuntimeError, ValueError) as error:
        raise _mismatch(run.checkpoint, str(error)) from error
    if run.scheduler is not None:
        run.scheduler.load_state_dict(state["scheduler"])
    losses.copy_(state["losses"])
    torch.set_rng_state(state["random"]["cpu"])
    if run.device.type == "cuda":
        torch.cuda.set_rng_state(state["random"]["cuda"], run.device)
    return int(state["step"])


def _mismatch(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        "the checkpoint belongs to another run",
        where=str(path),
        why=why,
        how="repeat that run, or delete the file to start over",
    )


def _check_counts(run: Run) -> None:
    for name, value in (("steps", run.steps), ("checkpoint_every", run.checkpoint_every)):
        if value < 1:
            raise OptionError(
                f"{name} must be at least 1, got {value}",
                where=name,
                why="a run counts in whole steps, and takes at least one",
                how=f"pass {name}=1 or more",
            )
