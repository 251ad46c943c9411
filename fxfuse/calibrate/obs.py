"""Optimal-brain-surgeon selection: which units of all members a group keeps.

Groups are gone through from the last to the first. Of all units of all members, one after the other
is removed: the one whose loss the remaining units make up for best, in the least-squares sense, at
the inputs of the layers that read the group (Hassibi & Stork, "Second order derivatives for network
pruning: Optimal Brain Surgeon", NeurIPS 1993, per unit instead of per weight).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from fxfuse.calibrate.inputs import Calibration
from fxfuse.calibrate.layers import name_of
from fxfuse.calibrate.units import Consumer, consumer_inputs, consumers_of
from fxfuse.coupling import CouplingGraph, Index
from fxfuse.labels import Kind

#: Ridge on the covariance, as a share of the mean of its diagonal.
_RIDGE = 1e-4
_BATCH_NORM = torch.ops.aten.batch_norm.default

State = Mapping[str, torch.Tensor]
#: For each group: (member, unit) of every unit that is kept, sorted, int64 [n, 2].
Kept = dict[str, Index]


def obs_selection(
    graph: CouplingGraph, states: Sequence[State], calibration: Calibration, *, host: int = 0
) -> Kept:
    """Selects as many units of all members as one member has, group by group.

    Args:
        graph: The analysis of the members.
        states: Their tensors by name.
        calibration: Unlabelled inputs.
        host: The member that keeps what is frozen inside the network.

    Returns:
        For each group that a layer reads, the units to keep, int64 [n_units, 2]: member and unit.
    """
    inputs = consumer_inputs(graph, states, calibration)
    consumers = consumers_of(graph)
    order = {node: place for place, node in enumerate(graph.captured.graph.nodes)}
    groups = [group for group in graph.groups if consumers[group.name]]
    groups.sort(key=lambda g: order[consumers[g.name][0].layer.node], reverse=True)
    kept: Kept = {}
    for group in groups:
        readers = consumers[group.name]
        width = 1 if all(c.repeated for c in readers) else readers[0].slots.shape[1]
        readers = [c for c in readers if _width(c) == width]
        each = [_covariance(inputs[c.layer], c) for c in readers]
        covariance = torch.stack(each).mean(0)
        weights = [_weights(graph, states, c, kept, host) for c in readers]
        scaled = [w / _norm(w, covariance) for w in weights]
        left = eliminate(covariance, torch.cat(scaled, 1), width, group.n_units)
        member, unit = np.divmod(left, group.n_units)
        kept[group.name] = np.stack([member, unit], axis=1)
    return kept


def eliminate(covariance: torch.Tensor, weights: torch.Tensor, width: int, n_left: int) -> Index:
    """Removes units one by one, until `n_left` are left.

    Args:
        covariance: Of what the readers get, [units · width, units · width].
        weights: The readers' weights, [units · width, outputs].
        width: Neurons of a unit.
        n_left: Units to keep.

    Returns:
        The units that are left, sorted, int64 [n_left].
    """
    size = len(covariance)
    level = covariance.diagonal().mean().clamp(min=1e-30)
    ridged = covariance.double() + _RIDGE * level * torch.eye(size, device=covariance.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(ridged))
    weights = weights.double().clone()
    n_units = size // width
    alive = torch.ones(n_units, dtype=torch.bool, device=covariance.device)
    for _ in range(n_units - n_left):
        loss = _losses(inverse, weights, width)
        loss[~alive] = torch.inf
        unit = int(loss.argmin())
        gone = slice(unit * width, (unit + 1) * width)
        step = torch.linalg.solve(inverse[gone, gone], inverse[gone])
        weights -= step.T @ weights[gone]
        inverse -= inverse[:, gone] @ step
        alive[unit] = False
        # What is gone must not come back by rounding.
        weights[gone] = 0
        inverse[gone] = 0
        inverse[:, gone] = 0
        inverse[gone, gone] = torch.eye(width, dtype=inverse.dtype, device=inverse.device)
    found: Index = alive.nonzero().flatten().cpu().numpy()
    return found


def _losses(inverse: torch.Tensor, weights: torch.Tensor, width: int) -> torch.Tensor:
    """What removing each unit costs after the others have made up for it; [units]."""
    if width == 1:
        return weights.square().sum(1) / inverse.diagonal()
    units = len(weights) // width
    blocks = inverse.reshape(units, width, units, width).diagonal(dim1=0, dim2=2).movedim(-1, 0)
    own = weights.reshape(units, width, -1)
    solved: torch.Tensor = torch.linalg.solve(blocks, own)
    return (own * solved).sum((1, 2))


def _width(consumer: Consumer) -> int:
    return 1 if consumer.repeated else consumer.slots.shape[1]


def _covariance(members: Sequence[torch.Tensor], consumer: Consumer) -> torch.Tensor:
    """Covariance of all members' units at one reader, [units · width, units · width]."""
    slots = torch.from_numpy(consumer.slots)
    columns = []
    for x in members:
        owned = x[:, slots.to(x.device)]
        columns.append(owned.movedim(1, 2).flatten(0, 1) if consumer.repeated else owned.flatten(1))
    rows = torch.cat(columns, 1)
    rows = rows - rows.mean(0)
    return (rows.T @ rows / len(rows)).double()


def _weights(
    graph: CouplingGraph, states: Sequence[State], consumer: Consumer, kept: Kept, host: int
) -> torch.Tensor:
    """A reader's weights from all members' units to those outputs that are kept.

    Returns:
        float64 [units · width, outputs]: zero between members.
    """
    slots = torch.from_numpy(consumer.slots)
    parts = []
    for member, state in enumerate(states):
        weight = _folded(graph, state, consumer).double()
        outputs = _outputs(graph, consumer, kept, member, host, weight.shape[1])
        weight = weight[:, torch.from_numpy(outputs).to(weight.device)]
        # [units, slots, outputs, kernel]
        own = weight[slots.to(weight.device)]
        parts.append(own.flatten(1) if consumer.repeated else own.flatten(0, 1).flatten(1))
    side_by_side: torch.Tensor = torch.block_diag(*parts)
    return side_by_side


def _folded(graph: CouplingGraph, state: State, consumer: Consumer) -> torch.Tensor:
    """The weight as [inputs, outputs, kernel], with the batch norm behind it folded in."""
    layer = consumer.layer
    weight = state[layer.weight].detach().unsqueeze(-1)
    weight = weight.movedim((layer.inputs, layer.outputs), (0, 1)).flatten(2)
    users = list(layer.node.users)
    if len(users) == 1 and users[0].target is _BATCH_NORM:
        args: Any = users[0].args
        gamma, variance = (name_of(graph.captured, args[i]) for i in (1, 4))
        if variance is not None:
            factor = (state[variance] + float(args[7])).rsqrt()
            factor = factor if gamma is None else factor * state[gamma]
            weight = weight * factor.detach()[None, :, None]
    return weight


def _outputs(
    graph: CouplingGraph,
    consumer: Consumer,
    kept: Kept,
    member: int,
    host: int,
    size: int,
) -> Index:
    """Which of a reader's outputs count in one member."""
    place = (consumer.layer.weight, consumer.layer.outputs)
    counts = np.ones(size, dtype=bool)
    reason = graph.frozen.get(place)
    if reason is not None and reason.kind is Kind.HOST and member != host:
        counts[reason.indices] = False
    for group in graph.group_of.get(place, ()):
        if group.name in kept:
            chosen = kept[group.name]
            counts[group.index[place].reshape(-1)] = False
            own = chosen[chosen[:, 0] == member, 1]
            counts[group.index[place][own].reshape(-1)] = True
    return np.flatnonzero(counts)


def _norm(weights: torch.Tensor, covariance: torch.Tensor) -> torch.Tensor:
    """√tr(MᵀCM), the size of what a reader makes of its inputs."""
    return ((covariance @ weights) * weights).sum().clamp(min=1e-30).sqrt()
