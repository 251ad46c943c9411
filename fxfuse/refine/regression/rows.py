"""What a layer is regressed on and what it is to answer, for a sample of its rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from fxfuse.activations import NodeRunner
from fxfuse.activations.layers import Layer
from fxfuse.refine.regression.fit_target import FitTarget
from fxfuse.refine.regression.wanted import Aim

#: A scale below this share of the largest one cannot be undone.
_SMALL = 1e-4
#: Rows per feature of a layer, at least `_ROWS` in all.
_PER_FEATURE, _ROWS = 4, 8192
#: Share of the rows that choose the penalty, and say whether a fit is better at all.
HELD_OUT = 0.2


def rows_for(features: int) -> int:
    """How many rows a regression on so many features looks at, about."""
    return max(_ROWS, _PER_FEATURE * features)


def evenly(count: int, most: int) -> slice:
    """At most `most` of `count` rows, spread evenly."""
    return slice(None, None, -(-count // most))


@dataclass(frozen=True)
class Sample:
    """Rows of a layer on the calibration inputs.

    Where the layer completes a residual sum, that is `scale · (output + offset)`.

    Attributes:
        rows: What the layer reads, float32 [n, groups, features].
        wanted: What its (normalised) output should be, float32 [n, channels].
        offset: float32 [n, channels], or [1, 1].
        scale: float32 [n, channels], or [1, 1].
        held: Which rows the choice of the penalty is made on, bool [n]: of the last inputs of each
            batch.
        weights: How much each row counts, float32 [n], 1 on average; None: all the same.
        ratios: How many rows each of them stands for, float32 [n], 1 on average; None: all the
            same.
    """

    rows: torch.Tensor
    wanted: torch.Tensor
    offset: torch.Tensor
    scale: torch.Tensor
    held: torch.Tensor
    weights: torch.Tensor | None = None
    ratios: torch.Tensor | None = None

    def aim(self, output: torch.Tensor) -> torch.Tensor:
        """What the node that is aimed at is worth when the layer answers `output`."""
        return self.scale * (output + self.offset)

    def output(self, aim: torch.Tensor) -> torch.Tensor:
        """The inverse of `aim`."""
        return aim / self.scale - self.offset

    def part(self, chosen: torch.Tensor) -> Sample:
        """Some of the rows, int64 [m]."""

        def some(values: torch.Tensor) -> torch.Tensor:
            return values if values.shape == (1, 1) else values[chosen]

        return Sample(
            self.rows[chosen],
            self.wanted[chosen],
            some(self.offset),
            some(self.scale),
            self.held[chosen],
            None if self.weights is None else self.weights[chosen],
            None if self.ratios is None else self.ratios[chosen],
        )


def sample(
    route: FitTarget, student: NodeRunner, aim: Aim, beside: FitTarget | None = None
) -> Sample | None:
    """Rows of a layer, spread over all calibration inputs.

    Args:
        route: The layer and its aim.
        student: The fused network, which has run up to the layer, or with it where whole values are
            aimed at.
        aim: What the aim should be.
        beside: A layer that writes the other operand of the sum (`joint_pairs`); what it reads
            comes before what the layer reads, and both together are to make up the sum.

    Returns:
        None where no member has a value to aim at, or the way there cannot be undone.
    """
    if aim.values is None:
        return None
    parts = list[tuple[torch.Tensor, ...]]()
    inputs = student.value(route.layer.input)
    aimed = route if beside is None else replace(route, skip=None)
    for batch, (x, z) in enumerate(zip(inputs, aim.values, strict=True)):
        find = _straight if aim.by_rows else _back
        back = find(aimed, student, batch, aim, z)
        if back is None:
            return None
        chosen, wanted, offset, scale = back
        parts.append((_read(route.layer, x, chosen, beside, student, batch), wanted, offset, scale))
    rows = _taken(parts)
    aims, offsets, scales = zip(*parts, strict=True)
    held = torch.cat([_last(len(part), part.device) for part in aims])
    weights = ratios = None
    if aim.by_rows:
        ratios = torch.cat(aim.ratios).to(held.device)
        weights = torch.cat(aim.scores).to(held.device) * ratios
        weights, ratios = weights / weights.mean(), ratios / ratios.mean()
    return Sample(rows, torch.cat(aims), _joined(offsets), _joined(scales), held, weights, ratios)


def _taken(parts: list[tuple[torch.Tensor, ...]]) -> torch.Tensor:
    """Join the first of each part, which is let go of: they are the largest of all by far."""
    counts = [len(part[0]) for part in parts]
    result = parts[0][0].new_empty(sum(counts), *parts[0][0].shape[1:])
    for place, into in enumerate(result.split(counts)):
        into.copy_(parts[place][0])
        parts[place] = parts[place][1:]
    return result


def _last(count: int, device: torch.device) -> torch.Tensor:
    """Which of the rows of a batch are the last ones, `HELD_OUT` of all."""
    return torch.arange(count, device=device) >= count - int(HELD_OUT * count)


def _read(
    layer: Layer,
    x: torch.Tensor,
    chosen: torch.Tensor,
    beside: FitTarget | None,
    student: NodeRunner,
    batch: int,
) -> torch.Tensor:
    """The chosen rows of what a layer reads, after those of the layer beside it."""
    rows = layer.input_rows(x, chosen).float()
    if beside is None:
        return rows
    other = beside.layer.input_rows(student.value(beside.layer.input)[batch], chosen).float()
    return torch.cat([other, rows], 2)


def _picked(values: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """The chosen rows [n, channels] of values, which may be one for all [1, 1]."""
    return values.float() if values.shape == (1, 1) else values[chosen].float()


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return parts[0] if parts[0].shape == (1, 1) else torch.cat(tuple(parts))


def _straight(
    route: FitTarget, student: NodeRunner, batch: int, aim: Aim, z: torch.Tensor
) -> tuple[torch.Tensor, ...] | None:
    """Brings rows of the aim back to the layer's output, where they stand at the same place.

    Returns:
        The rows, what they should be, offset and scale of `Sample`.
    """
    chosen = aim.chosen[batch].to(z.device)
    one = torch.ones(1, 1, device=z.device)
    if route.skip is None:
        return chosen, z, 0 * one, one
    skip = student.value(route.skip)[batch]
    shape = list(aim.shapes[batch])
    shape[aim.place.channels] = z.shape[1]
    if skip.dim() > len(shape) or torch.broadcast_shapes(skip.shape, shape) != tuple(shape):
        return None
    offset = aim.place.rows(skip.expand(shape), chosen).float()
    return chosen, z - offset, offset, one


def _back(
    route: FitTarget, student: NodeRunner, batch: int, aim: Aim, z: torch.Tensor
) -> tuple[torch.Tensor, ...] | None:
    """Brings the aim's whole value back to the layer's output, against the movements on the way.

    Returns:
        As `_straight`.
    """
    # The network may have run up to the layer only.
    like = student.compute_one(route.layer.node, batch, {})
    found = _undone(route, student, batch, like, z)
    if found is None:
        return None
    covered, wanted, offset, scale = found
    available = covered.nonzero().flatten()
    generator = torch.Generator().manual_seed(batch)
    order = torch.randperm(len(available), generator=generator)[: len(aim.chosen[batch])]
    chosen = available[order.to(available.device)].sort().values
    return chosen, wanted[chosen].float(), _picked(offset, chosen), _picked(scale, chosen)


def _undone(
    route: FitTarget, student: NodeRunner, batch: int, like: torch.Tensor, z: torch.Tensor
) -> tuple[torch.Tensor, ...] | None:
    """Which rows can be told, bool [rows]; what they should be; offset and scale of `Sample`."""
    layer = route.layer
    one = torch.ones(1, 1, device=z.device)
    if route.skip is None:
        if z.shape != like.shape:
            return None
        wanted = layer.output_rows(z)
        return torch.ones(len(wanted), dtype=torch.bool, device=z.device), wanted, 0 * one, one
    skip = student.value(route.skip)[batch]
    if not route.chain and skip.shape == like.shape == z.shape:
        offset = layer.output_rows(skip)
        wanted = layer.output_rows(z) - offset
        return torch.ones(len(wanted), dtype=torch.bool, device=z.device), wanted, offset, one
    numbers = torch.arange(1, like.numel() + 1, device=z.device).reshape(like.shape)
    moved = _along(route, student, batch, numbers, moving=True)
    zero = _along(route, student, batch, torch.zeros_like(like), moving=False)
    scale = _along(route, student, batch, torch.ones_like(like), moving=False) - zero
    if moved.shape != z.shape or bool((scale.abs() < _SMALL * scale.abs().max()).any()):
        return None
    place = moved.flatten()
    seen = place > 0
    place = place[seen] - 1
    hit = torch.zeros(like.numel(), dtype=torch.bool, device=z.device)
    hit[place] = True
    # Where an output goes to several places, they may want different things of it.
    if int(hit.sum()) < len(place):
        return None

    def put(value: torch.Tensor, filling: float) -> torch.Tensor:
        flat = torch.full((like.numel(),), filling, device=z.device, dtype=z.dtype)
        flat[place] = value.expand(z.shape).flatten()[seen]
        return layer.output_rows(flat.reshape(like.shape))

    known = layer.output_rows(hit.reshape(like.shape)).all(1)
    factor = put(scale, 1.0)
    offset = put((skip + zero) / scale, 0.0)
    return known, put(z, 0.0) / factor - offset, offset, factor


def _along(
    route: FitTarget, student: NodeRunner, batch: int, value: torch.Tensor, *, moving: bool
) -> torch.Tensor:
    """Sends a stand-in for the layer's output along the chain; `moving`: positions alone."""
    known: dict[fx.Node, Any] = {route.output: value}
    for node in route.chain:
        if moving and node.target in _VALUES:
            known[node] = known[_activation(node, known)]
            continue
        # Also where it has run, as the chain of a partner has: that was on the layer's own output.
        target: Any = node.target
        args, kwargs = fx.map_arg(
            (node.args, node.kwargs), lambda n: student.compute_one(n, batch, known)
        )
        with torch.no_grad():
            known[node] = target(*args, **kwargs)
    result: torch.Tensor = known[route.chain[-1]] if route.chain else value
    return result


aten = torch.ops.aten
_VALUES = (
    *(aten.mul.Tensor, aten.mul_.Tensor, aten.add.Tensor, aten.add_.Tensor),
    *(aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default),
)


def _activation(node: fx.Node, known: Mapping[fx.Node, Any]) -> fx.Node:
    return next(n for n in node.all_input_nodes if n in known)
