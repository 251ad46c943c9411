"""Recurrent layers as linear equations: what each gate gets at every step, and from what.

Notation of shapes: t time steps, b batch, i input channels, h hidden units, r projected units (h
without a projection), g gates and units (`k h`, k the gates).
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxfuse.activations.layers import Layer, name_of, reads_of
from fxfuse.analysis.rules.recurrent import weights_of
from fxfuse.graph.arguments import argument
from fxfuse.graph.capture import Program
from fxfuse.graph.operator_facts import FACTS, Contraction, Recurrence

State = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Direction:
    """One direction of one layer: the names of its tensors.

    Attributes:
        part: Its number among all directions of all layers, which is where its states stand.
        backwards: Whether it goes from the last step to the first.
        inner: [g, i].
        recurrent: [g, r].
        biases: Each [g]; two or none.
        projection: [r, h], or "".
    """

    part: int
    backwards: bool
    inner: str
    recurrent: str
    biases: tuple[str, ...]
    projection: str

    @property
    def tensors(self) -> tuple[str, ...]:
        """All names."""
        own = (self.inner, self.recurrent, *self.biases, self.projection)
        return tuple(name for name in own if name)


@dataclass(frozen=True)
class Recurrent:
    """A node that is one or several recurrent layers, whose weights are its own.

    Attributes:
        states: The states that it begins with, [directions, b, r] and of an LSTM [directions, b, h]
            as well.
        batch_first: Whether the sequence is [b, t, i] and not [t, b, i].
        theirs: In a network of another size: the nodes before, of the same graph, that stand for
            what the members read, the sequence and then the states. None: those that it reads.
    """

    node: fx.Node
    input: fx.Node
    states: tuple[fx.Node, ...]
    layers: tuple[tuple[Direction, ...], ...]
    batch_first: bool
    theirs: tuple[fx.Node, ...] | None = None

    @property
    def reads(self) -> tuple[fx.Node, ...]:
        """The sequence, and the states."""
        return (self.input, *self.states)

    @property
    def tensors(self) -> tuple[str, ...]:
        """The names of all tensors."""
        return tuple(name for layer in self.layers for each in layer for name in each.tensors)

    def by_time(self, x: torch.Tensor) -> torch.Tensor:
        """Return a sequence of the node as [t, b, *]."""
        return x.transpose(0, 1) if self.batch_first else x


@dataclass(frozen=True)
class Equation:
    """Rows of the gates that are one linear map of what they read.

    Attributes:
        gates: Which gates: first, and behind the last.
        inner: Whether it reads the input.
        recurrent: Whether it reads the hidden state before the step.
    """

    gates: tuple[int, int]
    inner: bool = True
    recurrent: bool = True


def equations_of(node: fx.Node) -> tuple[Equation, ...]:
    """The equations of a step.

    All gates see the sum of both products, apart from a GRU's new state, which scales one of them.
    """
    facts = FACTS[node.target]
    assert isinstance(facts, Recurrence)
    gates = facts.gates
    if not facts.resets:
        return (Equation((0, gates)),)
    new = (gates - 1, gates)
    sides = Equation(new, recurrent=False), Equation(new, inner=False)
    return (Equation((0, gates - 1)), *sides)


@dataclass(frozen=True)
class Steps:
    """A direction on a batch, its first step first.

    Attributes:
        x: What it reads, [t, b, i].
        before: The hidden state before each step, [t, b, r].
        hidden: The hidden state behind each step, [t, b, r].
    """

    x: torch.Tensor
    before: torch.Tensor
    hidden: torch.Tensor

    def sides(self, direction: Direction, state: State) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what the gates get from the input and from the state before, each [t, b, g]."""
        inner = self.x @ state[direction.inner].T
        again = self.before @ state[direction.recurrent].T
        if not direction.biases:
            return inner, again
        first, second = (state[name] for name in direction.biases)
        return inner + first, again + second

    def unprojected(self, direction: Direction, state: State, cells: torch.Tensor) -> torch.Tensor:
        """Return what an LSTM's projection reads, [t, b, h], from the first `cells` [b, h]."""
        found = []
        for step in torch.add(*self.sides(direction, state)):
            into, forget, new, out = step.chunk(4, -1)
            cells = forget.sigmoid() * cells + into.sigmoid() * new.tanh()
            found.append(out.sigmoid() * cells.tanh())
        return torch.stack(found)


def run_direction(
    work: Recurrent,
    direction: Direction,
    state: State,
    x: torch.Tensor,
    initial: Sequence[torch.Tensor],
) -> Steps:
    """Run one direction of one layer on `x` [t, b, i]; `initial` are the states of all."""
    x = x.flip(0) if direction.backwards else x
    own = [s[direction.part : direction.part + 1].contiguous() for s in initial]
    states: Any = own if len(own) > 1 else own[0]
    target: Any = work.node.target
    weights = [state[name] for name in direction.tensors]
    told = (bool(direction.biases), 1, 0.0, False, False, False)
    hidden = target(x, states, weights, *told)[0]
    return Steps(x, torch.cat([own[0], hidden[:-1]]), hidden)


def side_by_side(layer: Sequence[Direction], steps: Sequence[Steps]) -> torch.Tensor:
    """Return what a layer hands on, [t, b, directions · r]."""
    each = zip(layer, steps, strict=True)
    return torch.cat([s.hidden.flip(0) if d.backwards else s.hidden for d, s in each], -1)


def recurrent_of(program: Program) -> tuple[Recurrent, ...]:
    """The recurrent layers of a network whose weights are parameters of their own, in graph order.

    Cells that a loop of the network calls share their weights, and are none.
    """
    reads = reads_of(program)
    found = (recurrent_at(program, node, reads) for node in program.graph.nodes)
    return tuple(work for work in found if work is not None)


def readers_of(program: Program) -> tuple[Layer, ...]:
    """What recurrent layers read, each product of a step as the layer that it would be by itself.

    The first layer's directions read the node's input. The hidden states before the steps are those
    behind them but for one, where they can be seen: of a last layer that goes one way.
    """
    found = []
    for work in recurrent_of(program):
        first, last = work.layers[0], work.layers[-1]
        found += [Layer(work.node, work.input, d.inner, "", Contraction()) for d in first]
        outputs = [n for n in work.node.users if n.target is operator.getitem and n.args[1] == 0]
        if len(last) == 1 and outputs:
            found.append(Layer(work.node, outputs[0], last[0].recurrent, "", Contraction()))
    return tuple(found)


def recurrent_at(program: Program, node: fx.Node, reads: Mapping[str, int]) -> Recurrent | None:
    """Return the recurrent layers that a node is, if all their weights are its own."""
    facts = FACTS.get(node.target)
    if not isinstance(facts, Recurrence) or facts.is_cell:
        return None
    x, hx, parameters = (argument(node, name) for name in (facts.input, "hx", "params"))
    states = tuple(hx) if isinstance(hx, list | tuple) else (hx,)
    names = [name_of(program, each) for each in parameters]
    own = [name for name in names if name is not None and reads[name] == 1]
    if len(own) < len(names) or not all(isinstance(n, fx.Node) for n in (x, *states)):
        return None
    directions = 2 if argument(node, "bidirectional") else 1
    count = directions * argument(node, "num_layers")
    parts = weights_of(own, has_biases=argument(node, "has_biases"), parts=count)
    each = [
        Direction(part, part % directions == 1, w.inner, w.recurrent, w.biases, w.projection or "")
        for part, w in enumerate(parts)
    ]
    layers = tuple(tuple(each[s : s + directions]) for s in range(0, len(each), directions))
    return Recurrent(node, x, states, layers, bool(argument(node, "batch_first")))
