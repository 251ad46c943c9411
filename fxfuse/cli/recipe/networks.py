"""The networks and inputs that a recipe names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from fxfuse.cli.model_names import is_pretrained, weights_in
from fxfuse.cli.recipe.record import check_made, parts_of, record
from fxfuse.cli.recipe.schema import DataSource, Made, Recipe
from fxfuse.cli.sources import Data, Preparation, read_data
from fxfuse.cli.zoo import inputs_for, make_member, make_model
from fxfuse.members.streamed import Stored


@dataclass(frozen=True)
class Networks:
    """What goes into a fusion.

    Attributes:
        members: The members, or the files that they stay in.
        template: For files: a module of their class.
        inputs: Example inputs.
    """

    members: Sequence[nn.Module | Path]
    template: nn.Module | None
    inputs: tuple[torch.Tensor, ...]

    @property
    def modules(self) -> list[nn.Module]:
        """The members, where they are in memory."""
        return [member for member in self.members if isinstance(member, nn.Module)]


def needs_modules(recipe: Recipe) -> bool:
    """Tell whether the members run, or may differ; else they stay in their files."""
    runs = recipe.calibration or recipe.train or recipe.evaluation or recipe.fuse.refine
    return bool(
        runs
        or recipe.fuse.heads
        or len(recipe.members) == 1
        or any(m.args or is_pretrained(Path(m.path)) for m in recipe.members)
    )


def load_networks(recipe: Recipe, *, in_memory: bool = False) -> Networks:
    """Make what a recipe names; relative paths begin at the working directory.

    `in_memory` asks for modules even of members that might stay in their files.
    """
    files = [Path(m.path) for m in recipe.members]
    if not (in_memory or needs_modules(recipe)):
        template = make_model(recipe.model, recipe.model_args)
        return Networks(files, template, _inputs(recipe, template, Stored(files[0]).dtype()))
    members: list[nn.Module] = []
    for file, own in zip(files, recipe.members, strict=True):
        members.append(make_member(recipe.model, {**recipe.model_args, **own.args}, file))
    return Networks(members, None, _inputs(recipe, members[0]))


def load_data(source: DataSource | None) -> Data | None:
    """Read the examples that a recipe names, if it does."""
    if source is None:
        return None
    size = None if source.size is None else (source.size[0], source.size[1])
    return read_data(source.source, Preparation(source.limit, size, source.mean, source.std))


def files_of(recipe: Recipe) -> list[Path]:
    """Return the files that a recipe reads."""
    given = [Path(m.path) for m in recipe.members]
    files = [f for path in given for f in (weights_in(path) if is_pretrained(path) else [path])]
    found = [part for file in files for part in parts_of(file)]
    sources = [recipe.calibration, recipe.evaluation, recipe.train.data if recipe.train else None]
    others = [s.source for s in sources if s is not None]
    others += [text for text in (recipe.fuse.plan, recipe.input) if isinstance(text, str)]
    return found + [Path(text) for text in others if Path(text).is_file()]


def made_with(recipe: Recipe, networks: Networks) -> Made:
    """Return what a recipe is run with now; none of its files may have changed since it was run."""
    made = record(files_of(recipe), networks.inputs[0].device, Path.cwd())
    if recipe.made is not None:
        check_made(recipe.made, made)
    return made


def _inputs(
    recipe: Recipe, network: nn.Module, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, ...]:
    spec = recipe.input if isinstance(recipe.input, str) else ",".join(map(str, recipe.input))
    return inputs_for(network, spec, dtype)
