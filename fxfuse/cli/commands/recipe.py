"""`fxfuse recipe`: an example, the schema for editors, or a check of a recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fxfuse.cli.options import Json
from fxfuse.cli.recipe import Recipe, example, read_recipe
from fxfuse.cli.show import out, print_json

Checked = Annotated[
    Path | None,
    typer.Argument(help="A recipe to check.", metavar="RECIPE", show_default=False),
]
Example = Annotated[
    bool, typer.Option("--example", help="Print a recipe with every field and what it means.")
]
Schema = Annotated[
    bool, typer.Option("--schema", help="Print the JSON schema, for editors that know YAML.")
]


def recipe(
    path: Checked = None, example_: Example = False, schema: Schema = False, json_: Json = False
) -> None:
    """Print an example of a recipe or its JSON schema, or check a recipe."""
    if (path is not None) + example_ + schema != 1:
        raise typer.BadParameter("give a recipe to check, or one of --example and --schema")
    if schema:
        print_json(Recipe.model_json_schema())
    elif path is None:
        out.print(example(), markup=False, highlight=False, end="")
    else:
        found = read_recipe(path)
        if json_:
            print_json(json.loads(found.model_dump_json()))
        else:
            fused = f"{len(found.members)} networks of {found.model}"
            out.print(f"{path} holds no mistake: {fused}", markup=False)
