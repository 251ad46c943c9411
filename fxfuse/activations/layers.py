"""Layers: operators that multiply an activation by a parameter, as rows times a matrix (im2col)."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from fxfuse.activations.parts import ViewChain, is_read_once, part_of, view_chain_of
from fxfuse.graph.arguments import argument
from fxfuse.graph.capture import Program
from fxfuse.graph.operator_facts import FACTS, Contraction


@dataclass(frozen=True)
class Layer:
    """A node that computes rows(x) · matrix(weight) + bias.

    Attributes:
        facts: Where the weight has its inputs and outputs, and the activation its channels. Of a
            transposed convolution: it is a convolution of its input spread out by the stride, with
            zeros in between, by the kernel turned round.
        groups: Number of groups; the weight's inputs are those of one group, and of a transposed
            convolution its outputs.
        way: From the weight to the rows of it that the layer reads; empty: it reads the whole.
        bias_way: The same for the bias.
    """

    node: fx.Node
    input: fx.Node
    weight: str
    bias: str
    facts: Contraction
    groups: int = 1
    way: ViewChain = ()
    bias_way: ViewChain = ()

    def held(self, state: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the weight, or the part of it that the layer reads, among tensors by name."""
        return part_of(self.way, state[self.weight])

    def held_bias(self, state: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the same of the bias; there has to be one."""
        return part_of(self.bias_way, state[self.bias])

    def put(self, state: dict[str, torch.Tensor], weight: torch.Tensor) -> None:
        """Set what `held` returns; tensors that were there stay as they are."""
        state[self.weight] = _with_part(self.way, state[self.weight], weight)

    def put_bias(self, state: dict[str, torch.Tensor], bias: torch.Tensor) -> None:
        """Set what `held_bias` returns; tensors that were there stay as they are."""
        state[self.bias] = _with_part(self.bias_way, state[self.bias], bias)

    @property
    def written(self) -> int:
        """Dimension of the weight that tells the units of the output apart.

        Of a transposed convolution with groups that is the one of the inputs: along the other one
        all groups stand on top of each other.
        """
        transposed = self.facts.transposed and self.groups > 1
        return self.facts.inputs if transposed else self.facts.outputs

    def channels_last(self, x: torch.Tensor) -> torch.Tensor:
        """Return an input or output of the layer with its channels last, [..., channels]."""
        return x.movedim(self.facts.channels, -1)

    def n_rows(self, y: torch.Tensor) -> int:
        """Return the rows of one output of the layer: examples times positions."""
        return y.numel() // y.shape[self.facts.channels]

    def output_rows(self, y: torch.Tensor) -> torch.Tensor:
        """Return an output of the layer, or anything of its shape, as [rows, channels]."""
        last = self.channels_last(y)
        return last.reshape(-1, last.shape[-1])

    def input_rows(self, x: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """Return what the `chosen` rows of the output are computed from, [n, groups, features].

        Features are channels of a group, then kernel positions.
        """
        space = self.facts.space
        if not space:
            return x.reshape(-1, x.shape[-1])[chosen].unsqueeze(1)
        patches = self._patches_back(x) if self.facts.transposed else self._patches(x)
        sizes = [patches.shape[0], *patches.shape[2 : 2 + space]]
        rows = patches.movedim(1, 1 + space)[torch.unravel_index(chosen, sizes)]
        return rows.reshape(len(chosen), self.groups, -1)

    def matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the weight as [groups, features, outputs of a group]."""
        if not self.facts.space:
            return (weight if self.facts.transposed else weight.t()).unsqueeze(0)
        if self.facts.transposed:
            taps = weight.flatten(2).transpose(1, 2)
            return taps.reshape(self.groups, -1, weight.shape[1])
        return weight.reshape(self.groups, -1, weight[0].numel()).transpose(1, 2)

    def weight_of(self, matrix: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Return the weight that `matrix` gives [groups, features, outputs of a group]."""
        if not self.facts.space:
            weight = matrix[0] if self.facts.transposed else matrix[0].t()
        elif self.facts.transposed:
            taps = matrix.reshape(like.shape[0], -1, like.shape[1])
            weight = taps.transpose(1, 2).reshape(like.shape)
        else:
            weight = matrix.transpose(1, 2).reshape(like.shape)
        return weight.to(like.dtype).contiguous()

    def _patches(self, x: torch.Tensor) -> torch.Tensor:
        """View of the padded input: [batch, channels, *positions, *kernel]."""
        kernel = _shape(argument(self.node, "weight"))[2:]
        stride, dilation = self._along("stride"), self._along("dilation")
        padding: Any = argument(self.node, "padding")
        if padding == "same":
            total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
            sides = [(t // 2, t - t // 2) for t in total]
        elif padding == "valid":
            sides = [(0, 0)] * len(kernel)
        else:
            sides = [(p, p) for p in self._along("padding")]
        return self._unfolded(x, sides, kernel, stride, dilation)

    def _patches_back(self, x: torch.Tensor) -> torch.Tensor:
        """As `_patches`, of a transposed convolution's input, in the order of its kernel."""
        kernel = _shape(argument(self.node, "weight"))[2:]
        names = ("stride", "dilation", "padding", "output_padding")
        stride, dilation, padding, extra = map(self._along, names)
        sizes = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], stride, strict=True)]
        spread = x.new_zeros(*x.shape[:2], *sizes)
        index = [slice(None), slice(None), *(slice(None, None, s) for s in stride)]
        spread[tuple(index)] = x
        # A tap reaches as far back as the kernel is long; a padding takes that away again.
        reach = [d * (k - 1) - p for d, k, p in zip(dilation, kernel, padding, strict=True)]
        sides = [(r, r + e) for r, e in zip(reach, extra, strict=True)]
        patches = self._unfolded(spread, sides, kernel, [1] * len(kernel), dilation)
        return patches.flip([-1 - d for d in range(len(kernel))])

    def _along(self, name: str) -> list[int]:
        """An argument of the node, with a number for each dimension that the kernel goes along."""
        given = argument(self.node, name)
        values = list(given) if isinstance(given, list | tuple) else [given]
        return values * self.facts.space if len(values) == 1 else values

    def _unfolded(
        self,
        x: torch.Tensor,
        sides: Sequence[tuple[int, int]],
        kernel: Sequence[int],
        stride: Sequence[int],
        dilation: Sequence[int],
    ) -> torch.Tensor:
        """View of a padded input: [batch, channels, *positions, *kernel]."""
        x = F.pad(x, [p for side in reversed(sides) for p in side])
        for d in range(len(kernel)):
            x = x.unfold(2 + d, dilation[d] * (kernel[d] - 1) + 1, stride[d])
            x = x[..., :: dilation[d]]
        return x


def layers_of(program: Program) -> tuple[Layer, ...]:
    """Return the layers of a network whose weight is a parameter of its own, in graph order.

    Weights that are used twice or tied, and weights that are computed, make no layer; one that is
    cut into parts, as the projections of a cross attention are, makes one for each part.
    """
    reads, found = reads_of(program), []
    for node in program.graph.nodes:
        layer = layer_at(program, node)
        if layer is None:
            continue
        once = all(reads[name] == 1 for name in (layer.weight, layer.bias) if name)
        if once and is_read_once(layer.way) and is_read_once(layer.bias_way):
            found.append(layer)
    return tuple(found)


def reads_of(program: Program) -> Counter[str]:
    """How often the graph reads each state tensor, by canonical name; once: some node's own."""
    return Counter(
        program.canonical[str(n.target)]
        for n in program.graph.nodes
        if n.op == "get_attr" and str(n.target) in program.canonical
        for _ in n.users
    )


def name_of(program: Program, node: Any) -> str | None:
    """Canonical name of the floating-point state tensor that a node reads, if it reads one."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    name = program.canonical.get(str(node.target))
    return name if name is not None and program.tensor(name).is_floating_point() else None


def layer_at(program: Program, node: fx.Node) -> Layer | None:
    """Return the layer that a node is, whose weight may be used elsewhere, too."""
    facts = FACTS.get(node.target)
    if not isinstance(facts, Contraction) or any(argument(node, n) != 1 for n in facts.factors):
        return None
    x, weight, bias = (argument(node, n) for n in (facts.input, facts.weight, facts.bias))
    (name, way), (bias_name, bias_way) = (_read_by(program, n) for n in (weight, bias))
    if name is None or not isinstance(x, fx.Node) or x.op == "get_attr":
        return None
    if bias is not None and bias_name is None:
        return None
    # Parts are cut along the outputs, so that the inputs stand as in the whole.
    cuts = (argument(n, "dim") for n in way if n.target is not operator.getitem)
    if any(dim % program.tensor(name).dim() != facts.outputs for dim in cuts):
        return None
    rank, groups = 2 + facts.space, argument(node, facts.groups) or 1
    if not isinstance(groups, int):
        return None
    if program.tensor(name).dim() != rank or (facts.space and len(_shape(node)) != rank):
        return None
    return Layer(node, x, name, bias_name or "", facts, groups, way, bias_way)


def _read_by(program: Program, node: Any) -> tuple[str | None, ViewChain]:
    """Name of the state tensor of which a node is a part, and the way there."""
    found = view_chain_of(node)
    if found is None:
        return None, ()
    return name_of(program, found[0]), found[1]


def _with_part(way: ViewChain, whole: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """Return a tensor whose part at the end of a way is `part`, in the dtype that it has."""
    if not way:
        return part.to(whole.dtype)
    whole = whole.detach().clone()
    part_of(way, whole).copy_(part)
    return whole


def _shape(node: Any) -> Sequence[int]:
    shape: Sequence[int] = node.meta["val"].shape
    return shape
