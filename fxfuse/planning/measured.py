"""What was measured on calibration inputs, checked before a method or a score works on it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from fxfuse.activations import unit_activations
from fxfuse.activations.gradients import Gradients, gradients
from fxfuse.analysis.coupling import CouplingGraph
from fxfuse.errors import InputError, OptionError
from fxfuse.planning.context import Context, State

Matrix = NDArray[np.float64]


def require_activations(
    graph: CouplingGraph, states: Sequence[State], context: Context, user: str
) -> dict[str, list[torch.Tensor]]:
    """Return what the units of every group answer to the calibration inputs, [rows, n_units].

    They are in the context, or are measured on its inputs; `user` is what needs them, for
    messages.
    """
    n_members, given = len(states), context.activations
    if given is None and context.calibration is not None:
        given = unit_activations(graph, states, context.calibration)
    if given is None:
        raise InputError(
            f"{user} needs calibration inputs",
            why="it compares units by their activations",
            how="pass calibration=..., 100 to 1,000 inputs without labels",
        )
    found = {}
    for group in graph.groups:
        tensors = list(given.get(group.name, ()))
        shapes = [tuple(t.shape) for t in tensors]
        units = [graph.units_of(group.name, member) for member in range(n_members)]
        rows = shapes[0][0] if shapes and shapes[0] else 0
        if shapes != [(rows, n) for n in units] or rows < 2:
            raise InputError(
                "activations do not fit the members",
                where=f"group {group.name}",
                why=f"{n_members} tensors [rows, units] with two or more rows are needed, of "
                f"{', '.join(map(str, units))} units, got {shapes}",
                how="compute them on the same calibration inputs for every member",
            )
        for member, tensor in enumerate(tensors):
            if not bool(torch.isfinite(tensor).all()):
                raise InputError(
                    "an activation on the calibration inputs is not finite",
                    where=f"group {group.name}, member {member}",
                    why="a unit returns NaN or infinity",
                    how="check the calibration inputs, or leave this member out",
                )
        found[group.name] = tensors
    return found


def matrix_of(tensor: torch.Tensor) -> Matrix:
    """Return a real tensor in float64, on the CPU."""
    return tensor.detach().to("cpu", torch.float64).numpy()


def require_gradients(
    graph: CouplingGraph, states: Sequence[State], context: Context, user: str
) -> Sequence[Gradients]:
    """Return the members' gradients."""
    if graph.program.heads:
        raise OptionError(
            f"{user} does not work with several heads",
            why="it needs the gradient of one loss on one output, and each head has its own task",
            how="use score='l2', 'bn_scale', 'activation' or 'obs'",
        )
    n_members, given = len(states), context.gradients
    if given is None and context.calibration is not None and context.calibration.labels:
        calls = [args for args, _ in context.calibration.batches]
        pairs = list(zip(calls, context.calibration.labels, strict=True))
        each = (graph.of_member(member).program for member in range(n_members))
        given = [gradients(own, pairs, state) for own, state in zip(each, states, strict=True)]
    if given is None or len(given) != n_members:
        raise InputError(
            f"{user} needs labelled calibration inputs",
            why="it measures units by the gradient of the loss"
            + ("" if given is None else f", which was passed for {len(given)} members"),
            how="pass calibration=... with batches (inputs, labels)",
        )
    return given
