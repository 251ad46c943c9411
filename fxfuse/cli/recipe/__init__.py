"""Recipes: a fusion written down, from the members' files to the folder that comes out."""

from fxfuse.cli.recipe.run import Outcome, prepare_output, run
from fxfuse.cli.recipe.schema import Recipe
from fxfuse.cli.recipe.text import (
    as_recipe,
    changed,
    example,
    moved_to,
    read_recipe,
    trusted,
    write_recipe,
)

__all__ = [
    "Outcome",
    "Recipe",
    "as_recipe",
    "changed",
    "example",
    "moved_to",
    "prepare_output",
    "read_recipe",
    "run",
    "trusted",
    "write_recipe",
]
