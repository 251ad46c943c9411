"""The networks and inputs that a recipe names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from fxfuse.cli.hub import member_path
from fxfuse.cli.model_names import is_pretrained
from fxfuse.cli.own_preparation import own_tokens, own_transform, takes_mask
from fxfuse.cli.recipe.record import check_made, parts_of, record
from fxfuse.cli.recipe.schema import DataSource, Made, Recipe
from fxfuse.cli.sources import Data, is_text, read_data
from fxfuse.cli.zoo import inputs_for, make_member, make_model
from fxfuse.members.checkpoint import Stored, weights_in
from fxfuse.members.members import Members


@dataclass(frozen=True)
class Networks:
    """What goes into a fusion.

    Attributes:
        members: The members, in memory or in their files.
        inputs: Example inputs.
    """

    members: Members
    inputs: tuple[torch.Tensor, ...]

    @property
    def modules(self) -> list[nn.Module]:
        """The members, where they are in memory."""
        return [member for member in self.members.networks if isinstance(member, nn.Module)]

    def each(self) -> Iterator[nn.Module]:
        """Yield the members; those in files are read one by one."""
        for member in self.members.networks:
            (loaded,) = replace(self.members, networks=[member]).load().networks
            assert isinstance(loaded, nn.Module)
            yield loaded


def needs_modules(recipe: Recipe) -> bool:
    """Tell whether the members run, or may differ; else they stay in their files."""
    runs = recipe.calibration or recipe.train or recipe.evaluation or recipe.fuse.refine
    return bool(
        runs
        or recipe.fuse.heads
        or len(recipe.members) == 1
        or any(m.args or is_pretrained(member_path(m.path)) for m in recipe.members)
        or len({m.make() for m in recipe.members}) > 1
    )


def load_networks(recipe: Recipe, *, in_memory: bool = False) -> Networks:
    """Make what a recipe names; relative paths begin at the working directory.

    `in_memory` asks for modules even of members that might stay in their files.
    """
    files = [member_path(m.path) for m in recipe.members]
    if not (in_memory or needs_modules(recipe)):
        template = make_model(recipe.model, recipe.model_args)
        reading = recipe.members[0].make()
        own = template.state_dict(keep_vars=True)
        inputs = _inputs(recipe, template, Stored(files[0], own, reading.weights).dtype())
        return Networks(Members(files, template, checkpoints=reading), inputs)
    members: list[nn.Module] = []
    for file, member in zip(files, recipe.members, strict=True):
        arguments = {**recipe.model_args, **member.args}
        members.append(make_member(recipe.model, arguments, file, member.make().weights))
    return Networks(Members(members), _inputs(recipe, members[0]))


def load_data(source: DataSource | None, recipe: Recipe, networks: Networks) -> Data | None:
    """Read the examples that a recipe names, if it does.

    Where nothing says how images are prepared, the library of the networks may.
    """
    if source is None:
        return None
    images, first = source.make(), networks.inputs[0]
    prepared = images.prepared(source.limit)
    if is_text(source.source):
        masked = len(networks.inputs) > 1
        tokens = own_tokens(recipe.model, first.shape[-1], masked=masked)
        prepared = replace(prepared, tokens=tokens)
    elif not images.is_given and _holds_images(source.source):
        size = (first.shape[-2], first.shape[-1]) if first.dim() > 3 else None
        prepared = replace(prepared, transform=own_transform(recipe.model, size))
    return read_data(source.source, prepared)


def _holds_images(source: str) -> bool:
    kind = source.partition(":")[0]
    return Path(source).is_dir() or kind in ("torchvision", "datasets")


def files_of(recipe: Recipe) -> list[Path]:
    """Return the files that a recipe reads."""
    given = [member_path(m.path) for m in recipe.members]
    found = [part for path in given for part in parts_of(weights_in(path) or path)]
    others = [source.source for source in recipe.sources]
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
    inputs = inputs_for(network, spec, dtype)
    texts = any(is_text(source.source) for source in recipe.sources)
    if texts and len(inputs) == 1 and takes_mask(network):
        # Texts differ in length, so a mask goes with their tokens.
        inputs = (*inputs, torch.ones_like(inputs[0]))
    return inputs
