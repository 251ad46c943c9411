"""How much the task depends on what is in a row: the weights of a refit's regressions.

The distance of two answers is, to second order, a square of their difference in the metric of the
task. Through the network this is JᵀHJ for the values at a place, and the mean square of a random
probe's gradient has its diagonal as expectation. Rows on which nothing depends, as padding, count
nothing, and rare positions on which much depends count much.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from fxfuse.activations import NodeRunner
from fxfuse.activations.calibration import count_rows
from fxfuse.graph.example import first_line
from fxfuse.graph.torch_compat import output_spec, pytree
from fxfuse.refine.regression.place import Place
from fxfuse.refine.task import Task

#: A single probe is noisy: scores are brought closer to their mean by this power, and kept within
#: these factors of it.
_POWER, _LEAST, _MOST = 0.5, 0.1, 10.0
#: Share of the rows that are drawn whatever they are worth.
_EVENLY = 0.5
#: Categories that torch draws from at most.
_CATEGORIES = 2**24


class Sensitivity:
    """Scores rows by the gradient of a random probe of the output.

    Args:
        task: What the output means.
        seed: Seed of the probes.
    """

    def __init__(self, task: Task, seed: int) -> None:
        self.task, self._told = task, False
        self.generator = torch.Generator().manual_seed(seed)

    def scores(
        self, member: NodeRunner, batch: int, places: Sequence[Place]
    ) -> tuple[dict[Place, Tensor], dict[Place, Tensor]]:
        """Run one batch through a member, and score its rows.

        A place that the output does not depend on has no score. Where an operator has no
        derivative, no place has one, and a warning says so.

        Returns:
            Of each place the score of each row, float32 [rows] with mean 1, on the CPU; and of each
            place, or of none, the value.
        """
        outputs = [n for n in member.program.outputs() if isinstance(n, fx.Node)]
        own = {place: member.asked_as.get(place.node, place.node) for place in places}
        asked = set(own.values())
        values: dict[fx.Node, Tensor] = {}
        answers: dict[fx.Node, Any] = {}

        def take(node: fx.Node, value: Any) -> Any:
            if node in outputs:
                answers[node] = value
            if node in asked and isinstance(value, Tensor) and value.is_floating_point():
                handle = value if value.requires_grad else value.detach().requires_grad_()
                values[node] = handle
                answers[node] = handle
                # What runs next may change the value in place.
                return handle.clone()
            return None

        try:
            with torch.enable_grad():
                wanted = list(dict.fromkeys([*asked, *outputs]))
                member.once(batch, wanted, take, _CONVOLUTIONS)
                probe = self._probe(member, batch, answers)
                if not values or not probe.requires_grad:
                    return {}, {}
                found = torch.autograd.grad(probe, list(values.values()), allow_unused=True)
        # torch has no error class of its own for an operator without a derivative.
        except RuntimeError as error:
            if not self._told:
                self._told = True
                warnings.warn(
                    f"all positions count alike in the refit: {member.name} has no derivative "
                    f"({first_line(error)}).",
                    stacklevel=2,
                )
            return {}, {}
        gradients = dict(zip(values, found, strict=True))
        inputs = count_rows(member.calibration.batches[batch])
        scores = {
            place: _scored(place, gradient, inputs)
            for place, node in own.items()
            if (gradient := gradients.get(node)) is not None
        }
        known = {place: values[node].detach() for place, node in own.items() if node in values}
        return (
            {place: score for place, score in scores.items() if score is not None},
            known if len(known) == len(own) else {},
        )

    def _probe(self, member: NodeRunner, batch: int, answers: dict[fx.Node, Any]) -> Tensor:
        program = member.program
        leaves = [answers.get(n) if isinstance(n, fx.Node) else n for n in program.outputs()]
        spec = output_spec(program.graph)
        output = leaves[0] if spec is None else pytree.tree_unflatten(leaves, spec)
        _, kwargs = member.calibration.batches[batch]
        return self.task.probe(self.task.read(output), kwargs, self.generator)


def _scored(place: Place, gradient: Tensor, inputs: int) -> Tensor | None:
    """The score of each row; None where nothing depends on any.

    Every input counts as much as any other: what one probe says of whole inputs is mostly noise.
    """
    channels = place.channels if place.straight else -1
    square = gradient.detach().float().square().movedim(channels, -1).mean(-1).cpu()
    lines = square.reshape(inputs if len(square) == inputs else 1, -1)
    counts = lines > 0
    if not bool(counts.any()) or not bool(torch.isfinite(lines).all()):
        return None
    means = lines.sum(1, keepdim=True) / counts.sum(1, keepdim=True).clamp(min=1)
    score = (lines / means.clamp(min=torch.finfo(torch.float32).tiny)) ** _POWER
    score = torch.where(counts, score.clamp(_LEAST, _MOST), 0.0).flatten()
    return score / score.mean()


class _Convolution(torch.autograd.Function):
    """A convolution whose gradient is a convolution, too: of a dilated one torch's own is slow."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        padding: Sequence[int],
        dilation: Sequence[int],
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.padding, ctx.dilation = padding, dilation
        ones, zeros = [1] * len(padding), [0] * len(padding)
        return torch.convolution(x, weight, bias, ones, padding, dilation, False, zeros, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        kernel = weight.shape[2:]
        turned = weight.transpose(0, 1).flip(*range(2, weight.dim()))
        sizes = zip(kernel, ctx.padding, ctx.dilation, strict=True)
        sides = [d * (k - 1) - p for k, p, d in sizes]
        ones, zeros = [1] * len(kernel), [0] * len(kernel)
        found = torch.convolution(
            gradients[0], turned, None, ones, sides, ctx.dilation, False, zeros, 1
        )
        return found, None, None, None, None


def _convolution(
    operator: Callable[..., Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1,),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    groups: int = 1,
) -> Tensor:
    """Convolve, by `_Convolution` where that pays: with taps apart from each other."""
    space = weight.dim() - 2
    sides, apart = (list(s) * (space if len(s) == 1 else 1) for s in (padding, dilation))
    reach = (d * (k - 1) for d, k in zip(apart, weight.shape[2:], strict=True))
    if (
        max(apart) == 1
        or max(stride) > 1
        or groups > 1
        or x.dim() != weight.dim()
        or weight.requires_grad
        or any(p > r for p, r in zip(sides, reach, strict=True))
    ):
        return operator(x, weight, bias, stride, padding, dilation, groups)
    result: Tensor = _Convolution.apply(x, weight, bias, sides, apart)
    return result


_CONVOLUTIONS = {
    operator: partial(_convolution, operator)
    for operator in (
        torch.ops.aten.conv1d.default,
        torch.ops.aten.conv2d.default,
        torch.ops.aten.conv3d.default,
    )
}


def drawn(scores: Tensor, take: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw rows, those with a high score more often.

    Args:
        scores: Of each row, float32 [rows].
        take: How many.
        generator: On the CPU.

    Returns:
        The rows, int64 [at most `take`], none twice; and of every row how many it stands for if it
        is drawn, but for a factor.
    """
    counts = scores > 0
    take = min(take, int(counts.sum()))
    share = _EVENLY * counts / counts.sum() + (1 - _EVENLY) * scores / scores.sum()
    if take == int(counts.sum()):
        return counts.nonzero().flatten(), torch.ones_like(scores)
    if len(scores) > _CATEGORIES:
        rows = counts.nonzero().flatten()
        order = torch.randperm(len(rows), generator=generator)[:take]
        return rows[order], torch.ones_like(scores)
    chosen = torch.multinomial(share.double(), take, generator=generator)
    return chosen, 1 / share.clamp(min=1e-30) / len(scores)
