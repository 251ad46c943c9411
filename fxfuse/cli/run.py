"""`fxfuse run`: a recipe, or a result's own recipe again."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from fxfuse.cli.options import Force, Json
from fxfuse.cli.outcome import show_outcome
from fxfuse.cli.show import working
from fxfuse.recipe import moved_to, read_recipe
from fxfuse.recipe import run as run_recipe

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


def run(recipe: RecipePath, out: OtherOut = None, force: Force = False, json: Json = False) -> None:
    """Fuse as a recipe says; on a folder that fxfuse wrote, make its content again."""
    asked = read_recipe(recipe)
    if out is not None:
        asked = moved_to(asked, os.path.abspath(out))
    with working() as (stage, progress):
        outcome = run_recipe(asked, force=force, stage=stage, progress=progress)
    show_outcome(outcome, out or Path(os.path.relpath(outcome.folder)), json=json)
