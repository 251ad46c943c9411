"""From what a user typed to models and inputs."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxfuse.cli.options import parse_member_args
from fxfuse.cli.recipe import Recipe, as_recipe
from fxfuse.cli.zoo import inputs_for, make_member, make_model, parse_model_args, shape_in


def load_model(
    model: str, model_arg: Iterable[str] | None, example: str
) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """Make a model with the weights that its factory gives it, and inputs for it."""
    network = make_model(model, parse_model_args(model_arg or ()))
    return network, inputs_for(network, example)


def load_members(
    model: str,
    model_arg: Iterable[str] | None,
    example: str,
    checkpoints: Sequence[Path],
    weights: str | None = None,
    member_arg: Iterable[str] | None = None,
) -> tuple[list[nn.Module], tuple[torch.Tensor, ...]]:
    """Make one model per checkpoint, and inputs for them; `weights` as in `make_member`."""
    arguments = parse_model_args(model_arg or ())
    each = map(parse_model_args, parse_member_args(member_arg or (), len(checkpoints)))
    members = [
        make_member(model, {**arguments, **own}, path, weights)
        for path, own in zip(checkpoints, each, strict=True)
    ]
    return members, inputs_for(members[0], example)


def asked_recipe(
    model: str,
    model_arg: Iterable[str] | None,
    example: str,
    checkpoints: Sequence[Path],
    member_arg: Iterable[str] | None,
    reading: Mapping[str, Any],
    **parts: Any,
) -> Recipe:
    """Return the recipe that options of the command line come to.

    `reading` are the options of `Checkpoints`, for each of them.
    """
    each = parse_member_args(member_arg or (), len(checkpoints))
    members = [
        {"path": os.fspath(path), "args": parse_model_args(own), **reading}
        for path, own in zip(checkpoints, each, strict=True)
    ]
    return as_recipe(
        {
            "model": model,
            "model_args": parse_model_args(model_arg or ()),
            "members": members,
            "input": shape_in(example) or example,
            "base": os.getcwd(),
            **parts,
        }
    )
