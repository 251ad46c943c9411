"""Operators with one scale and shift per channel, fitted channel by channel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import fx

from fxfuse.activations import NodeRunner
from fxfuse.activations.layers import name_of, reads_of
from fxfuse.graph.arguments import argument
from fxfuse.graph.capture import Program
from fxfuse.graph.operator_facts import FACTS, Normalisation
from fxfuse.refine.regression.fit_target import Norm, norm_of
from fxfuse.refine.regression.wanted import Aim
from fxfuse.refine.regression.write import State

#: Rows that a fit of two numbers for each channel looks at, about.
ROWS = 32_768


@dataclass(frozen=True)
class PerChannel:
    """A normalisation that no layer takes in.

    Attributes:
        node: The node.
        weight: Name of its scale.
        bias: Name of its shift, or "".
        norm: The batch norm that it is, if it is one.
        channels: Dimension of the channels of the input and of the output.
    """

    node: fx.Node
    weight: str
    bias: str
    norm: Norm | None
    channels: int

    def unscaled(self, student: NodeRunner) -> Iterator[torch.Tensor]:
        """The node's value with scale 1 and shift 0, of each batch."""
        names = (self.weight, self.bias)

        def operand(batch: int, n: fx.Node) -> torch.Tensor:
            value: torch.Tensor = student.value(n)[batch]
            if n.op != "get_attr" or str(n.target) not in names:
                return value
            return torch.ones_like(value) if n.target == self.weight else torch.zeros_like(value)

        return student.compute(self.node, operand)


def per_channel_of(program: Program, taken: set[fx.Node]) -> tuple[PerChannel, ...]:
    """The normalisations of a network with one-dimensional parameters, but those that are taken."""
    reads = reads_of(program)
    nodes = (node for node in program.graph.nodes if node not in taken)
    found = (per_channel_at(program, node, reads) for node in nodes)
    return tuple(op for op in found if op is not None)


def per_channel_at(program: Program, node: fx.Node, reads: Mapping[str, int]) -> PerChannel | None:
    """The normalisation that a node is, if its tensors are its own."""
    facts, norm = FACTS.get(node.target), norm_of(program, node, reads)
    if not isinstance(facts, Normalisation):
        return None
    if norm is not None:
        return PerChannel(node, norm.weight, norm.bias, norm, facts.channels)
    # Instance norms, and batch norms that share a tensor.
    if facts.mean:
        return None
    weight, bias = argument(node, facts.weight), argument(node, facts.bias)
    name, shift = name_of(program, weight), name_of(program, bias)
    own = all(reads[n] == 1 for n in (name, shift) if n)
    if name and program.tensor(name).dim() == 1 and own and (bias is None or shift):
        return PerChannel(node, name, shift or "", None, facts.channels)
    return None


@dataclass(frozen=True)
class ChannelRows:
    """Rows of a normalisation on the calibration inputs, each float32 [n, channels].

    Attributes:
        unscaled: Its value with scale 1 and shift 0.
        wanted: What its value should be.
        inputs: What it reads.
    """

    unscaled: torch.Tensor
    wanted: torch.Tensor
    inputs: torch.Tensor


def channel_rows(op: PerChannel, student: NodeRunner, aim: Aim) -> ChannelRows | None:
    """Rows of a normalisation.

    Args:
        op: The normalisation.
        student: The fused network, which has run up to it.
        aim: What its value should be.

    Returns:
        None where no member has a value to aim at.
    """
    if aim.values is None:
        return None
    read, *_ = op.node.all_input_nodes
    parts, place = [], aim.place
    each = zip(op.unscaled(student), student.value(read), aim.values, aim.chosen, strict=True)
    for unscaled, given, z, chosen in each:
        wanted = z if aim.by_rows else place.rows(z, chosen)
        parts.append([place.rows(unscaled, chosen), wanted, place.rows(given, chosen)])
    columns = (torch.cat(column).float() for column in zip(*parts, strict=True))
    return ChannelRows(*columns)


def fit_channels(x: torch.Tensor, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale and shift of each channel that bring x [n, channels] closest to z."""
    x, z = x.double(), z.double()
    x_mean, z_mean = x.mean(0), z.mean(0)
    variance = x.var(0, correction=0)
    covariance = ((x - x_mean) * (z - z_mean)).mean(0)
    scale = torch.where(variance > 0, covariance / variance.clamp(min=1e-30), 0.0)
    return scale.float(), (z_mean - scale * x_mean).float()


def write_channels(
    op: PerChannel, state: State, x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor
) -> None:
    """Sets the parameters so that the node answers scale · unscaled + shift.

    Args:
        op: The normalisation.
        state: Tensors by name, changed.
        x: For a batch norm its input, for others nothing is read of it; [n, channels].
        scale: [channels].
        shift: [channels].
    """
    weight, bias = scale, shift
    if op.norm is not None:
        # The statistics become those of the inputs it has now, the function stays.
        before = (state[op.norm.variance].float() + op.norm.eps).sqrt()
        mean, variance = x.mean(0), x.var(0, correction=0)
        weight = scale * (variance + op.norm.eps).sqrt() / before
        bias = shift + scale * (mean - state[op.norm.mean]) / before
        state[op.norm.mean] = mean.to(state[op.norm.mean].dtype)
        state[op.norm.variance] = variance.to(state[op.norm.variance].dtype)
    state[op.weight] = weight.to(state[op.weight].dtype)
    if op.bias:
        state[op.bias] = bias.to(state[op.bias].dtype)
