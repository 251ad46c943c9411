"""Gradients of the loss on labelled calibration inputs, for scores that measure damage by them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from fxfuse.errors import InputError
from fxfuse.graph.capture import Program
from fxfuse.graph.eager import alone
from fxfuse.graph.example import first_line
from fxfuse.graph.run import untouched
from fxfuse.graph.tensors import tensors_in


@dataclass(frozen=True)
class Gradients:
    """Means over the batches of ∂L/∂w and |∂L/∂w|², of the shape of w, by its canonical name."""

    mean: Mapping[str, torch.Tensor]
    square: Mapping[str, torch.Tensor]


@alone
def gradients(
    program: Program,
    batches: Iterable[Any],
    state: Mapping[str, torch.Tensor] | None = None,
) -> Gradients:
    """Accumulate the gradients of the cross-entropy, batch by batch, in eval mode.

    Args:
        program: A captured member; its weights stay as they are.
        batches: Pairs `(inputs, labels)`: a tensor or a tuple of positional inputs, and int64
            [b, *] for logits [b, classes, *], the first tensor that the network returns.
        state: Other tensors by name, in place of the captured ones.

    Returns:
        Means over the batches; a parameter that the loss does not depend on has gradient 0.
    """
    state = program.once(program.state() if state is None else state)
    names = [n for n in state if isinstance(program.tensor(n), nn.Parameter)]
    leaves = {n: state[n].clone().requires_grad_() for n in names if _has_gradient(state[n])}
    mean = {n: torch.zeros_like(state[n]) for n in leaves}
    square = {n: torch.zeros_like(state[n].abs()) for n in leaves}
    count = 0
    for batch in batches:
        inputs, labels = _labelled(batch)
        loss = _loss(program, {**state, **leaves}, inputs, labels)
        found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        for name, gradient in zip(leaves, found, strict=True):
            if gradient is not None:
                mean[name] += gradient
                square[name] += gradient.abs() ** 2
        count += 1
    if not count:
        raise InputError(
            "there are no labelled calibration inputs",
            why="gradients are computed on batches (inputs, labels)",
            how="pass calibration= with batches (inputs, labels)",
        )
    return Gradients(
        {n: total / count for n, total in mean.items()},
        {n: total / count for n, total in square.items()},
    )


def _has_gradient(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _labelled(batch: Any) -> tuple[tuple[Any, ...], torch.Tensor]:
    pair = batch if isinstance(batch, tuple | list) else ()
    if len(pair) != 2 or not isinstance(pair[1], torch.Tensor):
        raise InputError(
            "labels are missing",
            where=f"a batch of type {type(batch).__name__}",
            why="this score needs the gradient of the cross-entropy",
            how="pass calibration= with batches (inputs, labels), or choose a score that needs no "
            "labels",
        )
    inputs, labels = pair
    return (inputs if isinstance(inputs, tuple) else (inputs,)), labels


def _loss(
    program: Program,
    state: Mapping[str, torch.Tensor],
    inputs: tuple[Any, ...],
    labels: torch.Tensor,
) -> torch.Tensor:
    try:
        module = program.module if program.is_exported else program.source
        assert module is not None
        with untouched(module):
            answer = functional_call(module, dict(state), inputs)
        logits = tensors_in(answer)[0]
        loss = nn.functional.cross_entropy(logits, labels)
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        raise InputError(
            "a labelled batch does not fit the network",
            where=f"inputs {[tuple(x.shape) for x in inputs if isinstance(x, torch.Tensor)]}, "
            f"labels {tuple(labels.shape)} of {labels.dtype}",
            why=first_line(error),
            how="pass inputs of the shapes that the network was captured with (another batch size "
            "is fine), and int64 labels [b, *] for logits [b, classes, *]",
        ) from error
    if not bool(torch.isfinite(loss)):
        raise InputError(
            "the loss on the calibration inputs is not finite",
            why=f"the cross-entropy of a batch is {loss.item()}",
            how="check the inputs, and that labels are class numbers",
        )
    return loss
