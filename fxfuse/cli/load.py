"""From what a user typed to models and inputs."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxfuse.cli.options import parse_member_args
from fxfuse.recipe import Recipe, as_recipe
from fxfuse.tensors import floating_dtype
from fxfuse.zoo import make_inputs, make_member, make_model, parse_model_args

_SHAPE = re.compile(r"\s*\d+(\s*,\s*\d+)*\s*")


def load_model(
    model: str, model_arg: Iterable[str] | None, example: str
) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """Makes a model with the weights that its factory gives it, and inputs for it."""
    network = make_model(model, parse_model_args(model_arg or ()))
    return network, _inputs_for(network, example)


def load_members(
    model: str,
    model_arg: Iterable[str] | None,
    example: str,
    checkpoints: Sequence[Path],
    member_arg: Iterable[str] | None = None,
) -> tuple[list[nn.Module], tuple[torch.Tensor, ...]]:
    """Makes one model per checkpoint, and inputs for them."""
    arguments = parse_model_args(model_arg or ())
    members: list[nn.Module] = []
    each = parse_member_args(member_arg or (), len(checkpoints))
    for checkpoint, own in zip(checkpoints, each, strict=True):
        members.append(make_member(model, {**arguments, **parse_model_args(own)}, checkpoint))
    return members, _inputs_for(members[0], example)


def asked_recipe(
    model: str,
    model_arg: Iterable[str] | None,
    example: str,
    checkpoints: Sequence[Path],
    member_arg: Iterable[str] | None,
    **parts: Any,
) -> Recipe:
    """The recipe that options of the command line come to.

    Raises:
        RecipeError: An option has a value that it cannot have.
    """
    each = parse_member_args(member_arg or (), len(checkpoints))
    members = [
        {"path": os.fspath(path), "args": parse_model_args(own)}
        for path, own in zip(checkpoints, each, strict=True)
    ]
    shape = [int(n) for n in example.split(",")] if _SHAPE.fullmatch(example) else example
    return as_recipe(
        {
            "model": model,
            "model_args": parse_model_args(model_arg or ()),
            "members": members,
            "input": shape,
            "base": os.getcwd(),
            **parts,
        }
    )


def _inputs_for(model: nn.Module, example: str) -> tuple[torch.Tensor, ...]:
    """Inputs of the model's dtype, where they are made from a shape, and on its device."""
    return _on_its_device(model, make_inputs(example, floating_dtype(model.parameters())))


def _on_its_device(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    parameter = next(model.parameters(), None)
    return inputs if parameter is None else tuple(x.to(parameter.device) for x in inputs)
