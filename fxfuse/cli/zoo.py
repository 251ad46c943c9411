"""Models and example inputs for the command line, from text that a user types."""

from __future__ import annotations

import ast
import importlib
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxfuse.cli.model_names import is_pretrained, named_factory, suggestion
from fxfuse.errors import FxfuseError, InputError, OptionError
from fxfuse.graph.tensors import floating_dtype
from fxfuse.members.checkpoint import load_checkpoint, read_file

#: torch.export specialises a batch of 1.
BATCH = 2

_SHAPE = re.compile(r"\s*\d+(\s*,\s*\d+)*\s*")
#: Token ids: the length, and how many there are.
_IDS = re.compile(r"ids:(\d+)(?::(\d+))?")
_VOCABULARY = 100


def parse_model_args(pairs: Iterable[str]) -> dict[str, Any]:
    """Parse `key=value` texts; a value is a Python literal, or else the text itself."""
    arguments: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key.isidentifier():
            raise OptionError(
                f"invalid model argument {pair!r}",
                why="it is not of the form key=value",
                how="write it like --model-arg num_classes=10",
            )
        try:
            arguments[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            arguments[key] = text
    return arguments


def make_model(spec: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Call a model factory, and return its model in eval mode.

    `spec` is `package.module:factory`, importable; or a library's name of a network,
    `torchvision:resnet18`, `timm:convnext_tiny`, `hf:FOLDER`.
    """
    factory = named_factory(spec) or import_object(spec)
    try:
        model = factory(**arguments)
    except FxfuseError:
        raise
    except Exception as error:
        raise OptionError(
            f"{spec} cannot be called",
            where=f"{spec}({', '.join(f'{k}={v!r}' for k, v in arguments.items())})",
            why=f"{type(error).__name__}: {error}",
            how="pass the arguments of the factory with --model-arg key=value",
        ) from error
    if not isinstance(model, nn.Module):
        raise OptionError(
            f"{spec} returns a {type(model).__name__}, not a torch.nn.Module",
            where=spec,
            how="use a class or function that returns the network itself",
        )
    return model.eval()


def make_member(
    spec: str, arguments: Mapping[str, Any], checkpoint: Path, weights: str | None = None
) -> nn.Module:
    """Make a model with the weights of a checkpoint; of several in it, those that `weights` names.

    For `hf:` the checkpoint may also be a folder that `save_pretrained` wrote.
    """
    if spec.startswith("hf:") and is_pretrained(checkpoint):
        return make_model(f"hf:{checkpoint}", arguments)
    model = make_model(spec, arguments)
    load_checkpoint(model, checkpoint, weights)
    return model


def make_inputs(
    spec: str, dtype: torch.dtype = torch.float32, vocabulary: int = _VOCABULARY
) -> tuple[torch.Tensor, ...]:
    """Make or read example inputs.

    `spec` is a shape without the batch dimension, such as `3,224,224`; `ids:LENGTH` or
    `ids:LENGTH:VOCABULARY` for token ids, int64; or a `.safetensors` or `.pt` file that holds one
    tensor, or (`.pt`) a sequence of tensors with their batch. `dtype` is that of a tensor made from
    a shape, and `vocabulary` counts where the text names none.
    """
    shape = shape_in(spec)
    if shape is not None:
        if 0 in shape:
            raise _bad_input(spec, "a dimension of size 0 holds nothing")
        generator = torch.Generator().manual_seed(0)
        return (torch.randn(BATCH, *shape, generator=generator).to(dtype),)
    ids = _IDS.fullmatch(spec)
    if ids is not None:
        length, vocabulary = int(ids[1]), int(ids[2] or vocabulary)
        if not length or not vocabulary:
            raise _bad_input(spec, "a dimension of size 0 holds nothing")
        generator = torch.Generator().manual_seed(0)
        return (torch.randint(vocabulary, (BATCH, length), generator=generator),)
    if not Path(spec).exists():
        raise _bad_input(spec, "it is neither a shape nor the path of a file")
    content = read_file(spec)
    if isinstance(content, Mapping) and len(content) == 1:
        content = next(iter(content.values()))
    inputs = tuple(content) if isinstance(content, list | tuple) else (content,)
    if not inputs or not all(isinstance(value, torch.Tensor) for value in inputs):
        raise _bad_input(spec, "the file holds neither one tensor nor a sequence of tensors")
    return inputs


def shape_in(spec: str) -> list[int] | None:
    """Return the sizes that a text such as `3,224,224` names; None where it is no shape."""
    return [int(size) for size in spec.split(",")] if _SHAPE.fullmatch(spec) else None


def inputs_for(
    network: nn.Module, spec: str, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, ...]:
    """Make or read inputs as `make_inputs`, on a network's device and by default of its dtype."""
    # Networks of transformers say how many tokens they know.
    known = getattr(getattr(network, "config", None), "vocab_size", None) or _VOCABULARY
    inputs = make_inputs(spec, dtype or floating_dtype(network.parameters()), known)
    parameter = next(network.parameters(), None)
    return inputs if parameter is None else tuple(x.to(parameter.device) for x in inputs)


def import_from(folder: str | None) -> None:
    """Let functions be imported from a folder, too, after all that is installed."""
    if folder and not sys.flags.safe_path and folder not in sys.path:
        sys.path.append(folder)


def import_object(spec: str) -> Callable[..., object]:
    """Import a function or class that a user named as `package.module:name`."""
    module_name, _, attribute = spec.partition(":")
    if not module_name or not attribute:
        near = suggestion(spec) if ":" not in spec else ""
        raise OptionError(
            f"invalid name {spec!r}",
            why="it is not of the form package.module:factory",
            how=f"did you mean {near}?"
            if near
            else "write it like torchvision:resnet18, "
            "timm:convnext_tiny, hf:FOLDER or package.module:factory",
        )
    try:
        value: Any = attrgetter(attribute)(importlib.import_module(module_name))
    # Importing runs the user's module, which may raise anything.
    except Exception as error:
        raise OptionError(
            f"{spec} cannot be imported",
            where=spec,
            why=f"{type(error).__name__}: {error}",
            how=_install_hint(module_name),
        ) from error
    if not callable(value):
        raise OptionError(
            f"{spec} cannot be called",
            where=spec,
            why=f"it is a {type(value).__name__}",
            how="use a class or function",
        )
    factory: Callable[..., object] = value
    return factory


def _install_hint(module_name: str) -> str:
    if module_name.partition(".")[0] == "torchvision":
        return 'pip install "fxfuse[vision]", and check the spelling'
    return "check the spelling, and that the module is installed or in the working directory"


def _bad_input(spec: str, why: str) -> InputError:
    return InputError(
        f"the example input cannot be read: {spec!r}",
        where=spec,
        why=why,
        how="use a shape without the batch dimension, such as --input 3,224,224, or a file",
    )
