"""Calibration inputs against what the members were trained on, as batch norms remember it."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, fx

from fxfuse.activations.calibration import CalibrationBatches
from fxfuse.activations.layers import name_of
from fxfuse.activations.node_runner import NodeRunner
from fxfuse.graph.arguments import argument
from fxfuse.graph.capture import Program
from fxfuse.graph.operator_facts import batch_norm_of
from fxfuse.graph.source_lines import source_of

#: Inputs that are looked at, and values of a channel that tell its variance.
_INPUTS, _ENOUGH = 16, 32
#: How far off most channels may be: the variance as a factor, the mean in standard deviations.
_FACTOR, _DEVIATIONS = 6.0, 3.0


def warn_of_statistics(program: Program, calibration: CalibrationBatches) -> None:
    """Warn where the first batch norm sees values far from those that it was trained on.

    Most often that means that the inputs were not normalised as in training.

    Args:
        program: A member.
        calibration: The inputs, of which some are looked at.
    """
    nodes = program.graph.nodes if program.is_exported else ()
    norm = next((node for node in nodes if batch_norm_of(node) is not None), None)
    facts = batch_norm_of(norm)
    if norm is None or facts is None:
        return
    state, read = program.state(), argument(norm, facts.input)
    names = [name_of(program, argument(norm, name)) for name in (facts.mean, facts.variance)]
    mean, variance = (None if name is None else state[name].detach().double() for name in names)
    if mean is None or variance is None or mean.is_meta or not isinstance(read, fx.Node):
        return
    # The statistics of a network that was never trained are zeros and ones.
    if not bool(mean.any()):
        return
    found: list[Tensor] = []

    def take(_: fx.Node, value: Any) -> None:
        found.append(value.detach().double().movedim(facts.channels, -1).flatten(0, -2))

    with torch.no_grad():
        NodeRunner(program, state, calibration.first(_INPUTS, _INPUTS)).once(0, [read], take)
    (values,) = found
    if len(values) < _ENOUGH or not bool((variance > 0).all()):
        return
    ratio = float((values.var(0) / variance).median())
    shift = float(((values.mean(0) - mean).abs() / variance.sqrt()).median())
    if 1 / _FACTOR <= ratio <= _FACTOR and shift <= _DEVIATIONS:
        return
    where = f"{norm.name} {source_of(norm)}".rstrip()
    warnings.warn(
        f"the calibration inputs are not like those of the training: at {where} most channels have "
        f"{ratio:.2g} times the variance that its batch norm remembers, and means {shift:.2g} "
        "standard deviations off. Normalise the inputs as in training.",
        stacklevel=4,
    )
