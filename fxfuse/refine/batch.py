"""What a training loop does with one batch: take it apart, run the network, find the logits."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from fxfuse.errors import FxfuseError, InputError, MemberError
from fxfuse.graph.run import answers


def split_batch(batch: Any) -> tuple[Any, Any]:
    """Return (inputs, labels), with None for labels that are not there."""
    if not isinstance(batch, (tuple, list)):
        return batch, None
    if len(batch) == 1:
        return batch[0], None
    if len(batch) == 2:
        return batch[0], batch[1]
    raise InputError(
        f"a batch is a {type(batch).__name__} of {len(batch)} items",
        where="batches",
        why="a tuple or list is read as the pair (inputs, labels)",
        how="pass pairs; several inputs go into one tuple: ((a, b, c), labels)",
    )


def call(module: nn.Module, inputs: Any) -> Any:
    """Run `module` on a tensor, a tuple of positional or a dict of keyword arguments."""
    if isinstance(inputs, Mapping):
        return module(**inputs)
    if isinstance(inputs, (tuple, list)):
        return module(*inputs)
    return module(inputs)


def try_call(
    module: nn.Module,
    args: tuple[Any, ...],
    name: str,
    kwargs: Mapping[str, Any] = MappingProxyType({}),
) -> Any:
    """Return what `module`, called `name` in messages, answers to inputs that a user gave."""
    try:
        return answers(module, {}, args, kwargs)
    except FxfuseError:
        raise
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        shapes = ", ".join(f"{list(tensor.shape)} {tensor.dtype}" for tensor in tensors)
        raise InputError(
            f"{name} rejects the inputs",
            where=f"inputs in batches of {shapes}",
            why=" ".join(str(error).split()),
            how="pass inputs of the shape and dtype that the network was trained on",
        ) from error


def logits_of(output: Any) -> Tensor:
    """Return the logits in a module's output: the output itself, or its field of that name."""
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    raise MemberError(
        f"the network returns a {type(output).__name__}, which holds no logits",
        where="the network's output",
        why="the loss needs one tensor of logits, or an object with a field `logits`",
        how="wrap the network in a module that returns the logits, or pass loss= to finetune",
    )
