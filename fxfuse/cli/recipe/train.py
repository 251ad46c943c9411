"""The training that a recipe asks for after a fusion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.progress import Progress
from torch import nn

from fxfuse.cli.data import Batches
from fxfuse.cli.recipe.schema import Train
from fxfuse.cli.sources import Data
from fxfuse.errors import InputError, OptionError
from fxfuse.refine import MatchReport, RefineReport, default_optimizer, distill, finetune, match

#: Steps where a recipe names no budget.
_STEPS = 300
#: Learning rate of distillation and fine-tuning where a recipe names none.
_RATE = 1e-3


def train(
    asked: Train,
    module: nn.Module,
    members: Sequence[nn.Module],
    data: Data | None,
    *,
    outputs: str | None,
    seed: int,
    progress: bool | Progress,
) -> str:
    """Trains a network in place; returns what that did, in a sentence.

    Raises:
        InputError: There are no inputs.
        OptionError: A budget in seconds is for `match` only.
        InputError: There are no labels, where `finetune` needs them.
        RefineError: The run cannot go on.
    """
    if data is None:
        raise InputError(
            f"train: {asked.kind} needs inputs",
            why="the network is trained on them",
            how="name calibration data, or data: for this step",
        )
    if asked.kind == "match":
        told = match(
            module,
            members,
            data.inputs,
            steps=asked.steps,
            seconds=asked.seconds,
            batch=asked.batch,
            learning_rate=asked.learning_rate,
            outputs=outputs,
            seed=seed,
            progress=progress,
        )
        return _sentence("Matched to the ensemble", told)
    if asked.seconds is not None:
        raise OptionError(
            f"seconds does not work with train: {asked.kind}",
            why="its schedule needs the number of steps",
            how="use steps, or kind: match",
        )
    steps = asked.steps or _STEPS
    optimizer, scheduler = default_optimizer(module, steps, asked.learning_rate or _RATE)
    given: dict[str, Any] = {
        "steps": steps,
        "optimizer": optimizer,
        "scheduler": scheduler,
        "progress": progress,
        "seed": seed,
    }
    if len(data.inputs) > 1:
        raise OptionError(
            f"train: {asked.kind} takes one input, got {len(data.inputs)}",
            how="use kind: match",
        )
    images = data.inputs[0]
    if asked.kind == "finetune":
        batches = Batches(images, data.require_labels("train"), asked.batch, seed)
        return _sentence("Fine-tuned on labels", finetune(module, batches, **given))
    # Labels are not looked at; numbers stand in for them.
    batches = Batches(images, images.new_zeros(len(images)), asked.batch, seed)
    told_of = distill(module, members, batches, temperature=asked.temperature, **given)
    return _sentence("Distilled from the ensemble", told_of)


def _sentence(what: str, report: MatchReport | RefineReport) -> str:
    if isinstance(report, MatchReport):
        first, last, steps = report.first_loss, report.last_loss, report.steps
    else:
        first, last, steps = report.losses[0], report.losses[-1], len(report.losses)
    return f"{what} in {steps} steps: the loss went from {first:.4g} to {last:.4g}."
