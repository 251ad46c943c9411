"""`fxfuse refit`: a fusion that was written, refitted and matched to its members."""

from __future__ import annotations

import os

from fxfuse.api.saved import PLAN
from fxfuse.cli.flags import CALIBRATION, IMAGES, MATCH, REFIT, TASK, Given, takes
from fxfuse.cli.options import (
    Folder,
    Force,
    Json,
    OptionalCalibration,
    OutFolder,
    OwnModel,
    Text,
    Trust,
    calibration_source,
)
from fxfuse.cli.outcome import carry_out
from fxfuse.cli.recipe import changed, read_recipe, trusted
from fxfuse.cli.sources import absolute
from fxfuse.errors import InputError


@takes(CALIBRATION, IMAGES, TASK, REFIT, MATCH)
def refit(
    folder: Folder,
    out: OutFolder,
    calibration: OptionalCalibration = None,
    text: Text = None,
    *,
    given: Given,
    model: OwnModel = None,
    trust: Trust = False,
    force: Force = False,
    json: Json = False,
) -> None:
    """Apply the plan of a fusion again, and fit every layer to the members' activations.

    --refine refit,match matches the network to the ensemble, too.
    """
    recipe = trusted(read_recipe(folder), folder, model=model, trust=trust, data=["evaluation"])
    kept = recipe.fuse.model_dump(include={"task", "verify"}, exclude_defaults=True)
    source = calibration_source(calibration, text)
    if source is None:
        raise InputError(
            "a refit needs inputs",
            why="every layer is fitted to what the members answer to them",
            how="pass --calibration DATA with 100 to 1,000 of them, or --text FILE.txt",
        )
    (inputs,) = given.sources(absolute(source), like=recipe.images)
    # Everything else that was asked for is in the plan.
    asked = changed(
        recipe,
        fuse={
            **kept,
            **given.recipe(refine=["refit"]),
            "plan": os.path.abspath(folder / PLAN),
        },
        calibration=inputs,
        train=None,
        output={"folder": os.path.abspath(out), "report": recipe.output.report},
    )
    carry_out(asked, out, force=force, json=json)
