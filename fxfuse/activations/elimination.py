"""Optimal-brain-surgeon selection: which units of all members a group keeps.

Groups are gone through from the last to the first. Of all units of all members, one after the other
is removed: the one whose loss the remaining units make up for best, in the least-squares sense, at
the inputs of the layers that read the group (Hassibi & Stork, "Second order derivatives for network
pruning: Optimal Brain Surgeon", NeurIPS 1993, per unit instead of per weight).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from fxfuse.activations.calibration import CalibrationBatches
from fxfuse.activations.gradients import importances
from fxfuse.activations.layers import Layer, name_of
from fxfuse.activations.parts import part_of
from fxfuse.activations.units import (
    Consumer,
    consumer_inputs,
    consumers_of,
    each_once,
    member_lane,
)
from fxfuse.analysis.coupling import CouplingGraph, Index
from fxfuse.analysis.labels import Kind
from fxfuse.common.cholesky import cholesky_with_ridge
from fxfuse.errors import InputError
from fxfuse.graph.arguments import argument
from fxfuse.graph.operator_facts import batch_norm_of

#: Ridge on the covariance, as a share of the mean of its diagonal.
_RIDGE = 1e-3
#: Most neurons of all members that are looked at together; more are divided into blocks.
_MOST = 2048
#: Share of the units that may be gone before they are cut out of the matrices.
_CUT = 0.2
#: Columns that are collected before the matrices are brought up to date.
_COLLECTED = 128

#: Steps of the elimination, or what they cost.
Ranks = NDArray[np.float64]
State = Mapping[str, torch.Tensor]
#: For each member that takes part, for each group: the units that exist, int64 [k].
Kept = Mapping[int, Mapping[str, Index]]
#: For each group: units as (member, unit), int64 [n, 2].
Units = dict[str, Index]


@dataclass(frozen=True)
class _Removals:
    """What is removed of a group: see `elimination` and `eliminate`."""

    units: Index
    ranks: Ranks
    losses: Ranks
    total: float


def elimination(
    graph: CouplingGraph,
    states: Sequence[State],
    calibration: CalibrationBatches,
    kept: Kept,
    *,
    sizes: Mapping[str, int] | None = None,
    base_member: int = 0,
) -> dict[str, tuple[Index, Ranks]]:
    """The order in which units of all members are removed, until as many are left as are kept.

    A reader's outputs count as far as they survive themselves, in groups that were gone through
    before. Layers of the members' heads are readers, too: each of its own member's units. Groups of
    more than 2,048 neurons in all members together are gone through block by block: units make up
    only for units of their own block, and every block keeps its share.

    Args:
        graph: The analysis of the members.
        states: Their tensors by name.
        calibration: Unlabelled inputs.
        kept: The members that take part, and which of their units exist.
        sizes: How many units of each group are kept. None: as many as a member has.
        base_member: The member that keeps what is frozen inside the network.

    Returns:
        For each group that a layer reads: units as (member, unit), int64 [n, 2], and the step at
        which each of them is removed, float64 [n], higher for those that are left.
    """
    found = _removals(graph, states, calibration, kept, sizes, base_member)
    return {name: (each.units, each.ranks) for name, each in found.items()}


def errors_by_size(
    graph: CouplingGraph,
    states: Sequence[State],
    calibration: CalibrationBatches,
    *,
    sizes: Mapping[str, int],
    base_member: int = 0,
) -> dict[str, Ranks]:
    """What each number of units costs at the network's output, for each group by itself.

    The units that are left make up for those that were removed, as in `elimination`. Of what a
    reader makes of the units, the share r that is lost counts -log(1 - r), so that no layer closes
    altogether, times the root of the reader's importance (`fxfuse.activations.gradients`): layers
    behind it, once they are refitted, take back a part of what the importance foresees.

    Args:
        graph: The analysis of the members.
        states: Their tensors by name.
        calibration: Unlabelled inputs.
        sizes: How many units of each group are kept: of a reader, these outputs count.
        base_member: The member that keeps what is frozen inside the network.

    Returns:
        For each group that a layer reads, the cost of keeping 1, 2, ... and all units, float64
        [units of all members].
    """
    every = range(len(states))
    kept = {m: {g.name: np.arange(graph.units_of(g.name, m)) for g in graph.groups} for m in every}
    each = []
    for member, own in ((m, graph.of_member(m)) for m in every):
        runner = member_lane(own, member, states[member], calibration)
        each.append(importances(runner, _layers(own)))
    # Layers of members stand in one order.
    weights = dict(zip(each[0], np.mean([list(w.values()) for w in each], axis=0), strict=True))
    found = _removals(graph, states, calibration, kept, sizes, base_member, weights)
    errors = {}
    for name, removals in found.items():
        lost = np.concatenate([[0.0], np.cumsum(removals.losses)])[::-1] / removals.total
        errors[name] = -removals.total * np.log1p(-lost.clip(max=1 - 1e-9))
    return errors


def _layers(graph: CouplingGraph) -> list[Layer]:
    """The layers that read groups, each once."""
    return list({c.layer: None for readers in consumers_of(graph).values() for c in readers})


def _removals(
    graph: CouplingGraph,
    states: Sequence[State],
    calibration: CalibrationBatches,
    kept: Kept,
    sizes: Mapping[str, int] | None,
    base_member: int,
    importance: Mapping[Layer, float] | None = None,
) -> dict[str, _Removals]:
    """As `elimination`; with the importance of the first member's layers until one unit is left."""
    members = sorted(kept)
    graphs = [graph.of_member(m) for m in members]

    def readers_of(own: CouplingGraph) -> dict[str, list[Consumer]]:
        every = consumers_of(own)
        return {g: [c for c in cs if c.owner in (None, *members)] for g, cs in every.items()}

    consumers = each_once(readers_of, graphs)
    inputs = consumer_inputs(graphs, consumers, {m: states[m] for m in members}, calibration)
    left: Units = {}
    found: dict[str, _Removals] = {}
    own_sizes = {group.name: group.n_units for group in graph.groups}
    for name in _last_to_first(graphs[0], {n: consumers[0][n] for n in own_sizes}):
        width = width_of(consumers[0][name][0])
        # Each reader as it is in each member.
        each = zip(*(own[name] for own in consumers), strict=True)
        readers = [reader for reader in each if width_of(reader[0]) == width]
        counts = [1.0 if importance is None else importance[r[0].layer] ** 0.5 for r in readers]
        alive = [np.isin(np.arange(graph.units_of(name, m)), kept[m][name]) for m in members]
        there = np.concatenate(alive)
        size = (own_sizes if sizes is None else sizes)[name]
        n_left = min(size if importance is None else 1, int(there.sum()))
        system = partial(
            _system, graphs, states, members, readers, counts, inputs, left, base_member
        )
        ranks, losses = _in_blocks(system, alive, width, n_left)
        exist = [np.flatnonzero(a) for a in alive]
        owner = np.repeat(members, [len(units) for units in exist])
        units = np.stack([owner, np.concatenate(exist)], axis=1)
        found[name] = _Removals(units, ranks[there], losses, sum(counts))
        left[name] = units[np.argsort(-ranks[there])[:size]]
    return found


def _last_to_first(graph: CouplingGraph, consumers: Mapping[str, Sequence[Consumer]]) -> list[str]:
    """The groups that a layer reads, those that are read last first."""
    order = {node: place for place, node in enumerate(graph.program.graph.nodes)}

    def place(name: str) -> tuple[int, int]:
        # A recurrent layer reads its own units later than what it is given.
        layer = consumers[name][0].layer
        return order[layer.node], order[layer.input]

    return sorted((name for name, own in consumers.items() if own), key=place, reverse=True)


def _in_blocks(
    system: Callable[[Sequence[Index]], tuple[torch.Tensor, torch.Tensor]],
    alive: Sequence[NDArray[np.bool_]],
    width: int,
    n_left: int,
) -> tuple[Ranks, Ranks]:
    """Remove units of a group, block by block if it is too large to be looked at as a whole.

    Memory grows with the square of a block's neurons, and time with their cube. Units of the same
    number in all members are in the same block.

    Args:
        system: Of some units of each member, the covariance and the products (`eliminate`).
        alive: Of each member, which units exist, bool [units].
        width: Neurons of a unit.
        n_left: How many units are left.

    Returns:
        As `eliminate`; steps are those of blocks that are gone through side by side, each of which
        counts alike.
    """
    number, there = np.concatenate([np.arange(len(a)) for a in alive]), np.concatenate(alive)
    ranks, total, seen, left = np.full(len(there), -1.0), int(there.sum()), 0, 0
    steps: list[tuple[float, float]] = []
    count = -(-width * len(there) // _MOST)
    for first in range(count):
        at = number % count == first
        seen += int(there[at].sum())
        wanted = round(n_left * seen / max(total, 1)) - left
        left += wanted
        found, losses = eliminate(
            *system([np.arange(first, len(a), count) for a in alive]), width, there[at], wanted
        )
        stretch = total / max(int(there[at].sum()), 1)
        ranks[at] = found * stretch
        steps += [(step * stretch, float(loss) / count) for step, loss in enumerate(losses)]
    return ranks, np.array([loss for _, loss in sorted(steps)])


def _system(
    graphs: Sequence[CouplingGraph],
    states: Sequence[State],
    members: Sequence[int],
    readers: Sequence[Sequence[Consumer]],
    counts: Sequence[float],
    inputs: Mapping[Layer, Sequence[torch.Tensor]],
    left: Units,
    base_member: int,
    units: Sequence[Index],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Covariance of some units of each member, and products of their readers' weights.

    `counts` says how much each reader counts.
    """
    chosen = [
        [replace(c, slots=c.slots[u]) for c, u in zip(reader, units, strict=True)]
        for reader in readers
    ]
    covariances = [covariance_at(inputs[own[0].layer], own) for own in chosen]
    covariance, products = torch.stack(covariances).mean(0), []
    for own, count in zip(chosen, counts, strict=True):
        weights = [
            weights_at(graphs[i], states[m], own[i], left, m, base_member)
            for i, m in enumerate(members)
        ]
        products.append(count * products_of(weights, covariance))
    return covariance, torch.stack(products).sum(0)


def eliminate(
    covariance: torch.Tensor,
    products: torch.Tensor,
    width: int,
    alive: NDArray[np.bool_],
    n_left: int = 0,
) -> tuple[Ranks, Ranks]:
    """Remove units one by one, each time the one whose loss the others make up for best.

    Args:
        covariance: Of what the readers get, [units · width, units · width].
        products: Of the readers' weights W, W Wᵀ, [units · width, units · width].
        width: Neurons of a unit.
        alive: Which units exist, bool [units].
        n_left: Units that are left at the end, ranked by what the loss of each alone costs.

    Returns:
        The step at which each unit is removed, float64 [units]; -1 for those that do not exist. And
        what each step costs, float64 [steps].
    """
    ranks = np.full(len(alive), -1.0)
    units = np.flatnonzero(alive)
    covariance, products = covariance.double(), products.double()
    level = covariance.diagonal().mean().clamp(min=1e-30)
    covariance = _part(covariance, units, width)
    if not bool(torch.isfinite(covariance).all()):
        raise InputError(
            "units cannot be ranked by their activations",
            why="products of activations overflow float32, or are NaN",
            how="scale the calibration inputs as in training, and check them for NaN",
        )
    factors = cholesky_with_ridge(covariance[None], (_RIDGE * level)[None])
    left = _Left(torch.cholesky_inverse(factors[0]), _part(products, units, width), width)
    losses = np.zeros(max(len(units) - n_left, 0))
    for step in range(len(units) - n_left):
        loss = left.losses()
        unit = int(loss.argmin())
        losses[step] = max(float(loss[unit]), 0.0)
        ranks[units[left.units[unit]]] = step
        left.remove(unit)
    last = left.there.cpu().numpy()
    cost = left.losses().cpu().numpy()[last]
    ranks[units[left.units[last]]] = alive.sum() + np.argsort(np.argsort(cost))
    return ranks, losses


class _Left:
    """The inverse covariance and the products of the units that are left.

    Removing a unit changes both matrices by products of a few columns. To read and write whole
    matrices for each unit would take most of the time, so columns are collected and written many at
    once; until then only the diagonal blocks are kept up to date (compare the lazy updates of
    GPTQ, Frantar et al., arXiv:2210.17323, section 3.3).

    Attributes:
        units: Numbers of the units that the matrices are of, int64 [units].
    """

    def __init__(self, inverse: torch.Tensor, products: torch.Tensor, width: int) -> None:
        self.units = np.arange(len(inverse) // width)
        self._inverse, self._products, self._width = inverse, products, width
        self._start()

    def _start(self) -> None:
        """Nothing is collected, and nothing of what the matrices are of is gone."""
        n = len(self._inverse)
        # 1 where a neuron is left, 0 where it is gone: [units · width].
        self._there = self._inverse.new_ones(n)
        # Rows of the inverse, steps and rests, [columns, units · width] each: see `remove`.
        self._collected = self._inverse.new_zeros(3, max(_COLLECTED, self._width), n)
        self._count = self._gone = 0
        self._blocks = [_diagonal(m, self._width) for m in (self._inverse, self._products)]

    @property
    def there(self) -> torch.Tensor:
        """Which of the units are left, bool [units]."""
        return self._there[:: self._width] > 0

    def losses(self) -> torch.Tensor:
        """Return what removing each unit costs after the others have made up for it, [units].

        It is infinite for units that are gone.
        """
        inverse, products = self._blocks
        if self._width == 1:
            losses = (products / inverse).flatten()
        else:
            losses = torch.linalg.solve(inverse, products).diagonal(dim1=1, dim2=2).sum(1)
        return losses.masked_fill(~self.there, torch.inf)

    def remove(self, unit: int) -> None:
        """Take a unit out of the inverse covariance, and its weights over to the other units."""
        gone = slice(unit * self._width, (unit + 1) * self._width)
        rows, steps, rests = self._collected[:, : self._count]
        row = (self._inverse[gone] - rows[:, gone].T @ steps) * self._there
        own = self._products[gone] - steps[:, gone].T @ rests - rests[:, gone].T @ steps
        own = own * self._there
        # (I - kE) S (I - kE)ᵀ with k the step and E the rows that go.
        step = torch.linalg.solve(row[:, gone], row)
        rest = own - 0.5 * (own[:, gone] @ step)
        self._collected[:, self._count : self._count + self._width] = torch.stack([row, step, rest])
        self._count += self._width
        self._gone += 1
        self._there[gone] = 0
        self._lower(row, step, rest, unit)
        if self._gone > _CUT * len(self.units):
            self._write()
            self._cut()
        elif self._count + self._width > self._collected.shape[1]:
            self._write()

    def _lower(self, row: torch.Tensor, step: torch.Tensor, rest: torch.Tensor, unit: int) -> None:
        """Change the diagonal blocks as the removal of a unit changes the matrices."""
        row, step, rest = (m.reshape(self._width, -1, self._width) for m in (row, step, rest))
        inverse, products = self._blocks
        inverse -= torch.einsum("kui,kuj->uij", row, step)
        both = torch.einsum("kui,kuj->uij", step, rest)
        products -= both + both.mT
        inverse[unit] = torch.eye(self._width, dtype=inverse.dtype, device=inverse.device)
        products[unit] = 0

    def _write(self) -> None:
        """Bring the matrices up to date with what is collected."""
        rows, steps, rests = self._collected[:, : self._count]
        self._inverse.addmm_(rows.T, steps, alpha=-1)
        self._products.addmm_(steps.T, rests, alpha=-1).addmm_(rests.T, steps, alpha=-1)
        self._count = 0

    def _cut(self) -> None:
        """Cut out of the matrices what is gone."""
        keep = self.there.nonzero().flatten().cpu().numpy()
        self.units = self.units[keep]
        self._inverse, self._products = (
            _part(m, keep, self._width) for m in (self._inverse, self._products)
        )
        self._start()


def _part(matrix: torch.Tensor, units: Index, width: int) -> torch.Tensor:
    """Return the rows and columns of some units."""
    index = (units[:, None] * width + np.arange(width)).reshape(-1)
    chosen = torch.from_numpy(index).to(matrix.device)
    return matrix[chosen][:, chosen].contiguous()


def _diagonal(matrix: torch.Tensor, width: int) -> torch.Tensor:
    """Return a copy of the units' blocks on the diagonal, [units, width, width]."""
    units = len(matrix) // width
    blocks = matrix.reshape(units, width, units, width).diagonal(dim1=0, dim2=2)
    return blocks.movedim(-1, 0).clone()


def width_of(consumer: Consumer) -> int:
    """Return the neurons of a unit that a reader tells apart."""
    return 1 if consumer.repeated else consumer.slots.shape[1]


def covariance_at(members: Sequence[torch.Tensor], reader: Sequence[Consumer]) -> torch.Tensor:
    """Compute the covariance of all members' units at one reader, [units · width, units · width].

    `members` holds what the reader gets in each member, [rows, channels].
    """
    columns = []
    for x, consumer in zip(members, reader, strict=True):
        owned = x[:, torch.from_numpy(consumer.slots).to(x.device)]
        columns.append(owned.movedim(1, 2).flatten(0, 1) if consumer.repeated else owned.flatten(1))
    rows = torch.cat(columns, 1)
    rows = rows - rows.mean(0)
    return (rows.T @ rows / len(rows)).double()


def weights_at(
    graph: CouplingGraph,
    state: State,
    consumer: Consumer,
    left: Units,
    member: int,
    base_member: int,
) -> torch.Tensor:
    """Return a reader's weights from one member's units to those of its outputs that are left.

    Returns:
        float64 [units · width, outputs]; no outputs, where the reader is in another member's head.
    """
    if consumer.owner not in (None, member):
        device = next(iter(state.values())).device
        rows = len(consumer.slots) * width_of(consumer)
        return torch.zeros(rows, 0, dtype=torch.float64, device=device)
    weight = _folded(graph, state, consumer).double()
    shape = state[consumer.layer.weight].shape
    outputs = _outputs(graph, consumer, left, member, base_member, shape)
    weight = weight[:, torch.from_numpy(outputs).to(weight.device)]
    # [units, slots, outputs, kernel]
    own = weight[torch.from_numpy(consumer.slots).to(weight.device)]
    return own.flatten(1) if consumer.repeated else own.flatten(0, 1).flatten(1)


def _folded(graph: CouplingGraph, state: State, consumer: Consumer) -> torch.Tensor:
    """Return the weight as [inputs, outputs, kernel], with the batch norm behind it folded in."""
    layer = consumer.layer
    weight = layer.held(state).detach().unsqueeze(-1)
    weight = weight.movedim((layer.facts.inputs, layer.facts.outputs), (0, 1)).flatten(2)
    users = list(layer.node.users)
    norm = batch_norm_of(users[0]) if len(users) == 1 else None
    if norm is not None:
        given = (argument(users[0], name) for name in (norm.weight, norm.variance))
        gamma, variance = (name_of(graph.program, node) for node in given)
        if variance is not None:
            factor = (state[variance] + float(argument(users[0], norm.eps))).rsqrt()
            factor = factor if gamma is None else factor * state[gamma]
            weight = weight * factor.detach()[None, :, None]
    return weight


def _outputs(
    graph: CouplingGraph,
    consumer: Consumer,
    left: Units,
    member: int,
    base_member: int,
    shape: torch.Size,
) -> Index:
    """Return which of a reader's outputs count in one member, whose weight has this shape."""
    place = (consumer.layer.weight, consumer.layer.facts.outputs)
    counts = np.ones(shape[consumer.layer.facts.outputs], dtype=bool)
    reason = graph.frozen.get(place)
    if reason is not None and reason.kind is Kind.KEEP_BASE and member != base_member:
        counts[reason.indices] = False
    for group in graph.group_of.get(place, ()):
        if group.name in left:
            chosen = left[group.name]
            counts[group.index[place].reshape(-1)] = False
            own = chosen[chosen[:, 0] == member, 1]
            counts[group.index[place][own].reshape(-1)] = True
    # A layer that reads a part of the weight has the outputs of this part.
    layer = consumer.layer
    line = [-1 if dim == layer.facts.outputs else 1 for dim in range(len(shape))]
    read = part_of(layer.way, torch.from_numpy(counts).reshape(line).expand(shape))
    return np.flatnonzero(read.movedim(layer.facts.outputs, 0).flatten(1)[:, 0].numpy())


def products_of(own: Sequence[torch.Tensor], covariance: torch.Tensor) -> torch.Tensor:
    """Return W Wᵀ / tr(WᵀCW), so that readers of any size count alike.

    W is block-diagonal, since a member's outputs read its own units, and is never written out.

    Args:
        own: Of each member the weights from its units, [units · width, outputs].
        covariance: C, of all members' units.
    """
    products: torch.Tensor = torch.block_diag(*(weights @ weights.T for weights in own))
    return products / (covariance * products).sum().clamp(min=1e-30)
