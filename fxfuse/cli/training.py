"""Training after a fusion, on what `refine` does not take: labels, or a softened ensemble."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich.progress import Progress
from torch import nn

from fxfuse.cli.data import Batches
from fxfuse.cli.sources import Data
from fxfuse.common.options import Options
from fxfuse.errors import InputError, OptionError
from fxfuse.refine import default_optimizer, distill, finetune


@dataclass(frozen=True)
class Training(Options):
    """Training after a fusion: distillation from the ensemble, or fine-tuning on labels.

    Attributes:
        kind: `distill` minimises the KL divergence from the softened ensemble and needs no labels;
            `finetune` minimises the cross-entropy of the labels.
        steps: Optimiser steps.
        learning_rate: Highest learning rate.
        temperature: Temperature that softens the ensemble's answers, for `distill`.
        batch: Inputs per step.
    """

    kind: Literal["distill", "finetune"] = "distill"
    steps: int = 300
    learning_rate: float = 1e-3
    temperature: float = 4.0
    batch: int = 64

    def __post_init__(self) -> None:
        """Check that all numbers are positive."""
        super().__post_init__()
        for name in ("steps", "learning_rate", "temperature", "batch"):
            value = getattr(self, name)
            if not value > 0:
                raise OptionError(
                    f"{name} must be greater than 0, got {value}", how=f"pass a positive {name}"
                )


def train(
    options: Training,
    module: nn.Module,
    members: Sequence[nn.Module],
    data: Data | None,
    *,
    seed: int,
    progress: bool | Progress,
) -> str:
    """Train a network in place, and say in a sentence what that did."""
    if data is None:
        raise InputError(
            f"train: {options.kind} needs inputs",
            why="the network is trained on them",
            how="give calibration data, or data of its own",
        )
    if len(data.inputs) > 1:
        raise OptionError(
            f"train: {options.kind} takes one input",
            why=f"the data have {len(data.inputs)}",
            how="match the network to the ensemble instead: refine: [refit, match]",
        )
    steps, images = options.steps, data.inputs[0]
    optimizer, scheduler = default_optimizer(module, steps, options.learning_rate)
    given: dict[str, Any] = {
        "steps": steps,
        "optimizer": optimizer,
        "scheduler": scheduler,
        "progress": progress,
        "seed": seed,
    }
    if options.kind == "finetune":
        what = "Fine-tuned on labels"
        batches = Batches(images, data.require_labels("train"), options.batch, seed)
        report = finetune(module, batches, **given)
    else:
        what = "Distilled from the ensemble"
        # Labels are not looked at; numbers replace them.
        batches = Batches(images, images.new_zeros(len(images)), options.batch, seed)
        report = distill(module, members, batches, temperature=options.temperature, **given)
    first, last = report.losses[0], report.losses[-1]
    return f"{what} in {len(report.losses)} steps: the loss went from {first:.4g} to {last:.4g}."
