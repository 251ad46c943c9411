"""From a layer to what it aims at: its normalised output, or the residual sum that it completes."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import inf

import torch
from torch import fx

from fxfuse.activations.layers import Layer, layers_of, name_of, reads_of
from fxfuse.analysis.rules import find, movement
from fxfuse.analysis.rules.registry import name_of as operator_name
from fxfuse.graph.arguments import argument
from fxfuse.graph.capture import Program
from fxfuse.graph.operator_facts import FACTS, Dropout, batch_norm_of

aten = torch.ops.aten

_ADD = (aten.add.Tensor, aten.add_.Tensor, operator.add)
_MUL = (aten.mul.Tensor, aten.mul_.Tensor)
#: Operators that return their input, beside dropout.
_NOTHING = {"aten::alias", "aten::clone", "aten::contiguous", "aten::detach"}
#: Activations that let nothing of a value beyond a limit through → (lower, upper) limit.
_CUTS = {
    "aten::relu": (0.0, inf),
    "aten::relu_": (0.0, inf),
    "aten::relu6": (0.0, 6.0),
    "aten::relu6_": (0.0, 6.0),
}
_HARDTANH = ("aten::hardtanh", "aten::hardtanh_")


@dataclass(frozen=True)
class Norm:
    """A batch norm right behind a layer, with parameters and statistics of its own.

    Attributes:
        node: The node.
        input: What it normalises.
        weight: Name of γ.
        bias: Name of β.
        mean: Name of the running mean.
        variance: Name of the running variance.
        eps: Its ε.
    """

    node: fx.Node
    input: fx.Node
    weight: str
    bias: str
    mean: str
    variance: str
    eps: float


@dataclass(frozen=True)
class FitTarget:
    """What a layer is fitted to.

    Attributes:
        layer: The layer.
        norm: The batch norm behind it, if there is one.
        chain: Operators from there to the residual sum: movements of data, scales and shifts.
        skip: The other operand of the residual sum that this layer is the last to complete.
        aim: The node whose value is aimed at: the sum, or the (normalised) output.
        cut: What the activation behind the aim lets through: (lower, upper) limit.
        partner: The layer that writes the other operand of the sum, with its route to the sum.
    """

    layer: Layer
    norm: Norm | None
    chain: tuple[fx.Node, ...]
    skip: fx.Node | None
    aim: fx.Node
    cut: tuple[float, float] = (-inf, inf)
    partner: FitTarget | None = None

    @property
    def output(self) -> fx.Node:
        """The layer's output, normalised where there is a norm."""
        return self.layer.node if self.norm is None else self.norm.node

    @property
    def has_shift(self) -> bool:
        """Whether the output can be shifted, by a bias or by the norm."""
        return self.norm is not None or bool(self.layer.bias)

    @property
    def is_straight(self) -> bool:
        """Whether the layer's output is in the aim as it is, with nothing moved or scaled."""
        shapes = [list(map(str, n.meta["val"].shape)) for n in (self.layer.node, self.aim)]
        return shapes[0] == shapes[1] and all(_is_nothing(node) for node in self.chain)

    def alone(self) -> FitTarget:
        """The same layer, fitted to its own output."""
        return FitTarget(self.layer, self.norm, (), None, self.output, _cut_behind(self.output))


def routes_of(program: Program) -> tuple[FitTarget, ...]:
    """A route for each layer, in graph order."""
    order = {node: place for place, node in enumerate(program.graph.nodes)}
    reads, routes = reads_of(program), []
    #: Routes that lead to a sum of which the other operand comes later, by that operand's sum.
    early: dict[fx.Node, FitTarget] = {}
    for layer in layers_of(program):
        route = _route(program, layer, reads)
        if route.skip is not None and order[route.skip] > order[layer.node]:
            early[route.aim] = route
            route = route.alone()
        elif route.aim in early:
            route = replace(route, partner=early[route.aim])
        routes.append(route)
    return tuple(routes)


def _route(program: Program, layer: Layer, reads: Mapping[str, int]) -> FitTarget:
    """The way of a layer to the next sum, whichever operand of it comes first."""
    user = _only_user(layer.node)
    norm = None if user is None else norm_of(program, user, reads)
    output = layer.node if norm is None else norm.node
    chain: list[fx.Node] = []
    node, skip, aim = output, None, output
    for user in users_of(node):
        other = other_operand(user, node)
        if user.target in _ADD and other is not None and other.op != "get_attr":
            if not _is_scaled(user):
                skip, aim = other, user
            break
        if not _is_passed(user, other):
            break
        chain.append(user)
        node = user
    if skip is None:
        chain = []
    return FitTarget(layer, norm, tuple(chain), skip, aim, _cut_behind(aim))


def norm_of(program: Program, node: fx.Node, reads: Mapping[str, int]) -> Norm | None:
    """The batch norm that a node is, if its tensors are its own (`reads_of`)."""
    facts = batch_norm_of(node)
    if facts is None:
        return None
    names = [name_of(program, argument(node, n)) for n in facts.state]
    own = [n for n in names if n is not None and reads[n] == 1]
    if len(own) < len(names):
        return None
    weight, bias, mean, variance = own
    x, eps = argument(node, facts.input), float(argument(node, facts.eps))
    return Norm(node, x, weight, bias, mean, variance, eps)


def _is_scaled(node: fx.Node) -> bool:
    """Whether an addition multiplies its second operand."""
    return bool(node.kwargs.get("alpha", 1) != 1)


def users_of(node: fx.Node) -> Iterator[fx.Node]:
    """The only user of a node, and its only user, and so on."""
    user = _only_user(node)
    while user is not None:
        yield user
        user = _only_user(user)


def _only_user(node: fx.Node) -> fx.Node | None:
    # Sizes are read of every activation.
    users = [u for u in node.users if u.target is not aten.sym_size.int]
    user = users[0] if len(users) == 1 else None
    return user if user is not None and user.op == "call_function" else None


def other_operand(user: fx.Node, node: fx.Node) -> fx.Node | None:
    """The one other node that a user of a node reads; None where there is not exactly one."""
    others = [n for n in user.args if isinstance(n, fx.Node) and n is not node]
    return others[0] if len(others) == 1 else None


def _is_passed(user: fx.Node, other: fx.Node | None) -> bool:
    """Whether an operator moves data, or scales or shifts by parameters or constants."""
    if user.target in (*_ADD, *_MUL):
        return (other is None or other.op == "get_attr") and not _is_scaled(user)
    if _is_nothing(user):
        return True
    tensors = [n for n in user.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    rule = find(user.target)
    moves = rule is not None and rule.__module__ == movement.__name__
    return moves and len(tensors) == 1 and isinstance(user.meta.get("val"), torch.Tensor)


def _is_nothing(node: fx.Node) -> bool:
    """Whether a node returns its input, in eval mode."""
    return isinstance(FACTS.get(node.target), Dropout) or operator_name(node.target) in _NOTHING


def _cut_behind(node: fx.Node) -> tuple[float, float]:
    user = _only_user(node)
    if user is None:
        return (-inf, inf)
    name = operator_name(user.target)
    if name in _HARDTANH:
        return float(argument(user, "min_val")), float(argument(user, "max_val"))
    return _CUTS.get(name, (-inf, inf))
