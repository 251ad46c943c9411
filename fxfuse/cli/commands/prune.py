"""`fxfuse prune`: one checkpoint becomes a smaller one."""

from __future__ import annotations

import os

from fxfuse.cli.flags import (
    CALIBRATION,
    CHECKPOINTS,
    CONSTRAINTS,
    IMAGES,
    MATCH,
    METHOD,
    REFIT,
    SIZE,
    TASK,
    Given,
    takes,
)
from fxfuse.cli.load import asked_recipe
from fxfuse.cli.options import (
    Checkpoint,
    EvaluationSpec,
    Force,
    Input,
    Json,
    Model,
    ModelArg,
    NoVerify,
    OptionalCalibration,
    OutFolder,
    Report,
    Text,
    calibration_source,
)
from fxfuse.cli.outcome import carry_out
from fxfuse.errors import OptionError


@takes(CHECKPOINTS, METHOD, SIZE, CALIBRATION, IMAGES, TASK, REFIT, MATCH, CONSTRAINTS)
def prune(
    checkpoint: Checkpoint,
    model: Model,
    input: Input,
    out: OutFolder,
    model_arg: ModelArg = None,
    calibration: OptionalCalibration = None,
    text: Text = None,
    *,
    given: Given,
    data: EvaluationSpec = None,
    report: Report = False,
    no_verify: NoVerify = False,
    force: Force = False,
    json: Json = False,
) -> None:
    """Remove the least important channels, neurons and heads of one network."""
    if not given.make(SIZE).is_given:
        raise OptionError(
            "pruning needs a size",
            why="neither a width nor a budget is given",
            how="pass --width 0.5 to keep half of every layer, for instance",
        )
    inputs, evaluation = given.sources(calibration_source(calibration, text), data)
    recipe = asked_recipe(
        model,
        model_arg,
        input,
        [checkpoint],
        None,
        given.options(CHECKPOINTS),
        fuse={**given.recipe(), "verify": not no_verify},
        calibration=inputs,
        evaluation=evaluation,
        output={"folder": os.fspath(out), "report": report},
    )
    carry_out(recipe, out, force=force, json=json)
