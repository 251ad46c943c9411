"""`fxfuse refit`: a fusion that was written, refitted to its members."""

from __future__ import annotations

import os

from fxfuse.api.saved import PLAN
from fxfuse.cli.options import (
    CalibrationCopies,
    CalibrationLimit,
    CalibrationSpec,
    Folder,
    Force,
    Json,
    OutFolder,
)
from fxfuse.cli.outcome import carry_out
from fxfuse.cli.recipe import changed, read_recipe
from fxfuse.cli.sources import absolute


def refit(
    folder: Folder,
    out: OutFolder,
    calibration: CalibrationSpec,
    calibration_limit: CalibrationLimit = 1000,
    calibration_copies: CalibrationCopies = 0,
    force: Force = False,
    json: Json = False,
) -> None:
    """Apply the plan of a fusion again, and fit every layer to the members' activations."""
    recipe = read_recipe(folder)
    kept = recipe.fuse.model_dump(include={"outputs", "verify"})
    # Everything else that was asked for is in the plan.
    options = {
        **kept,
        "plan": os.path.abspath(folder / PLAN),
        "calibration_limit": calibration_limit,
        "calibration_copies": calibration_copies,
        "refit": True,
    }
    asked = changed(
        recipe,
        fuse=options,
        calibration=absolute(calibration),
        train=None,
        output={"folder": os.path.abspath(out), "report": recipe.output.report},
    )
    carry_out(asked, out, force=force, json=json)
