"""What watches a training run: the progress bar, and the checks that all is finite."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fxfuse.errors import RefineError
from fxfuse.refine.parallel import whole

if TYPE_CHECKING:
    from rich.progress import Progress

# Reading a loss waits for the device, so losses are read once in this many steps.
READ_EVERY = 20


@contextlib.contextmanager
def bar(
    shown: bool | Progress, label: str, total: float
) -> Iterator[Callable[[float, float], None]]:
    """Show a progress bar, and yield the function (how much is done, loss) that moves it on.

    Without rich, which the core does not install, a line is written after each tenth.
    """
    if shown is False:
        yield lambda done, loss: None
        return
    with contextlib.ExitStack() as stack:
        if shown is True:
            try:
                from rich.console import Console
                from rich.progress import Progress
            except ModuleNotFoundError:
                yield _lines(label, total)
                return
            progress = stack.enter_context(Progress(console=Console(stderr=True)))
        else:
            progress = shown
        task = progress.add_task(label, total=total)
        if progress is shown:
            stack.callback(progress.remove_task, task)
        yield lambda done, loss: progress.update(
            task, completed=done, description=f"{label}, loss {loss:.4f}"
        )


def _lines(label: str, total: float) -> Callable[[float, float], None]:
    tenths = 0

    def show(done: float, loss: float) -> None:
        nonlocal tenths
        if 10 * done >= (tenths + 1) * total:
            tenths = int(10 * done / total)
            print(f"{label}: {tenths}0 %, loss {loss:.4f}", file=sys.stderr)

    return show


def last_finite(losses: Tensor, start: int) -> float:
    """Return the last of the losses `[n]` of the steps after `start`; waits for the device."""
    values = losses.tolist()
    for step, value in enumerate(values, start + 1):
        if not math.isfinite(value):
            raise _diverged(f"the loss became {value} at step {step}", "loss")
    return float(values[-1])


def check_weights(module: nn.Module) -> None:
    """Check that the last step did not break the weights, which no loss has shown yet."""
    names, tensors = zip(*module.named_parameters(), strict=True)
    finite = torch.stack([whole(tensor.detach().isfinite().all()) for tensor in tensors]).tolist()
    if not all(finite):
        name = names[finite.index(False)]
        raise _diverged("a weight became infinite or NaN", name)


def _diverged(what: str, where: str) -> RefineError:
    return RefineError(
        what,
        where=where,
        why="training diverged, and the weights are unusable",
        how="lower the learning rate, and check inputs and labels for values out of range",
    )
