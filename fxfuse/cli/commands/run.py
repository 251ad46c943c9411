"""`fxfuse run`: a recipe, or a result's own recipe again."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from fxfuse.cli.options import Force, Json, OwnModel, Trust
from fxfuse.cli.outcome import carry_out
from fxfuse.cli.recipe import moved_to, read_recipe, trusted

RecipePath = Annotated[
    Path,
    typer.Argument(
        help="A recipe, or a folder that `fxfuse` wrote, to make its content again.",
        metavar="RECIPE|FOLDER",
        show_default=False,
    ),
]
OtherOut = Annotated[
    Path | None,
    typer.Option("--out", help="In place of the recipe's own folder.", metavar="FOLDER"),
]


def run(
    recipe: RecipePath,
    out: OtherOut = None,
    model: OwnModel = None,
    trust: Trust = False,
    force: Force = False,
    json: Json = False,
) -> None:
    """Fuse as a recipe says; on a folder that fxfuse wrote, make its content again.

    Functions that a recipe names are imported and run, those that a folder's recipe names only with
    `--trust`.
    """
    used = ["calibration", "evaluation", "train"]
    trust = trust or not recipe.is_dir()
    asked = trusted(read_recipe(recipe), recipe, model=model, trust=trust, data=used)
    if out is not None:
        asked = moved_to(asked, os.path.abspath(out))
    carry_out(asked, out, force=force, json=json)
