"""`fxfuse distill`: a fusion that was written, trained further."""

from __future__ import annotations

import os

from fxfuse.cli.flags import IMAGES, TRAINING, Given, takes
from fxfuse.cli.options import DataSpec, Folder, Force, Json, OutFolder, OwnModel, Trust
from fxfuse.cli.outcome import carry_out
from fxfuse.cli.recipe import changed, read_recipe, trusted
from fxfuse.cli.sources import absolute


@takes(IMAGES, TRAINING)
def distill(
    folder: Folder,
    data: DataSpec,
    out: OutFolder,
    given: Given,
    model: OwnModel = None,
    trust: Trust = False,
    force: Force = False,
    json: Json = False,
) -> None:
    """Make a fusion again, and train it on its ensemble's answers or on labels."""
    # Its own training is replaced.
    used = ["calibration", "evaluation"]
    recipe = trusted(read_recipe(folder), folder, model=model, trust=trust, data=used)
    (inputs,) = given.sources(absolute(data), like=recipe.images)
    asked = changed(
        recipe,
        train={**given.options(TRAINING), "data": inputs},
        output={"folder": os.path.abspath(out), "report": recipe.output.report},
    )
    carry_out(asked, out, force=force, json=json)
