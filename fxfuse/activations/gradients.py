"""Gradients on calibration inputs: of the loss, for scores, and of the outputs, for widths."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.func import functional_call

from fxfuse.activations.layers import Layer
from fxfuse.activations.node_runner import NodeRunner
from fxfuse.errors import InputError
from fxfuse.graph.capture import Program
from fxfuse.graph.eager import alone
from fxfuse.graph.example import first_line
from fxfuse.graph.run import untouched
from fxfuse.graph.tensors import tensors_in
from fxfuse.graph.torch_compat import pytree

#: About how many inputs tell how much a layer counts.
_INPUTS = 256
#: What autograd says then; it has no classes of errors for it. The second is for operators of one's
#: own, the rest for writes.
_NO_DERIVATIVE = (
    "is not implemented",
    "no autograd formula was registered",
    "modified by an inplace operation",
    "being modified inplace",
    "in an in-place operation",
)


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


def importances(runner: NodeRunner, layers: Sequence[Layer]) -> dict[Layer, float]:
    """How much the network's outputs change if a layer answers its mean to all inputs.

    To first order, and channel by channel: the variance of what the layer returns, times the square
    of the outputs' derivative by it, which is that of a sum of the outputs with random signs
    (Hutchinson, "A stochastic estimator of the trace", 1990).

    Args:
        runner: A network; a few hundred of its inputs are looked at.
        layers: Layers of it.

    Returns:
        A number for each layer, relative to their mean. A layer that returns no real tensor counts
        as the mean; if the outputs have no derivative, all layers do.
    """
    spread = {layer.node: _Spread(layer) for layer in layers}
    generator, batches = torch.Generator().manual_seed(0), len(runner.calibration.batches)
    enough = -(-_INPUTS * batches // max(runner.calibration.size, 1))
    for batch in range(min(batches, enough)):
        _look(runner, batch, spread, generator)
    found = {layer: spread[layer.node].value() for layer in layers}
    known = [value for value in found.values() if value is not None]
    mean = sum(known) / max(len(known), 1)
    if not 0 < mean < float("inf"):
        return dict.fromkeys(layers, 1.0)
    return {layer: 1.0 if value is None else value / mean for layer, value in found.items()}


class _Spread:
    """What a layer returns, and the outputs' derivatives by it, channel by channel."""

    def __init__(self, layer: Layer) -> None:
        self.layer, self.rows = layer, 0
        self.first = self.second = self.slope = torch.zeros(())

    def see(self, value: torch.Tensor) -> torch.Tensor:
        """Take note of a value, and return zeros of its shape that a derivative can be by."""
        rows = self.layer.output_rows(value.detach()).double()
        self.rows += len(rows)
        self.first = self.first + rows.sum(0)
        self.second = self.second + rows.square().sum(0)
        return torch.zeros_like(value, requires_grad=True)

    def value(self) -> float | None:
        """The importance; None where nothing was seen."""
        if not self.rows:
            return None
        variance = self.second / self.rows - (self.first / self.rows).square()
        return float((variance.clamp(min=0) * self.slope).sum())


def _look(
    runner: NodeRunner,
    batch: int,
    spread: Mapping[fx.Node, _Spread],
    generator: torch.Generator,
) -> None:
    """Run a batch, and add what it says."""
    (end,) = (node for node in runner.program.graph.nodes if node.op == "output")
    outputs = [n for n in pytree.tree_leaves(end.args) if isinstance(n, fx.Node)]
    shifts: dict[fx.Node, torch.Tensor] = {}
    answers: dict[fx.Node, torch.Tensor] = {}

    def take(node: fx.Node, value: Any) -> Any:
        real = isinstance(value, torch.Tensor) and value.is_floating_point()
        if real and node in spread:
            shifts[node] = spread[node].see(value)
            value = value + shifts[node]
        if real and node in outputs:
            answers[node] = value
        return value

    try:
        with torch.enable_grad():
            runner.once(batch, list(dict.fromkeys([*spread, *outputs])), take)
            signed = [_signed(y, generator) for y in answers.values() if y.requires_grad]
            if not signed:
                return
            slopes = torch.autograd.grad(signed, list(shifts.values()), allow_unused=True)
    except RuntimeError as error:
        if not _has_no_derivative(error):
            raise
        return
    for node, slope in zip(shifts, slopes, strict=True):
        if slope is not None:
            rows = spread[node].layer.output_rows(slope).double()
            spread[node].slope = spread[node].slope + rows.square().sum(0)


def _has_no_derivative(error: RuntimeError) -> bool:
    """Tell whether an operator has no derivative, or writes over what a derivative needs."""
    known = isinstance(error, NotImplementedError)
    return known or any(said in str(error) for said in _NO_DERIVATIVE)


def _signed(y: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The sum of a tensor with random signs."""
    signs = torch.randint(0, 2, y.shape, generator=generator) * 2 - 1
    return (y * signs.to(y)).sum()
