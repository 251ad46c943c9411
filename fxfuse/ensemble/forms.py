"""The forms that a value of the members' graph takes in the stack, and the ways between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import fx

from fxfuse.ensemble.policy import Policy
from fxfuse.ensemble.weights import Weights
from fxfuse.graph.arguments import argument, argument_names
from fxfuse.graph.capture import Program
from fxfuse.graph.tensors import tensors_in
from fxfuse.graph.torch_compat import free_unbacked_symbols, schema_of

aten = torch.ops.aten


class Form(Enum):
    """How the members' values of one node are in the stack.

    Shared: one value, the same for all members. Split: N values. Stacked: one tensor with an extra
    dimension in front, [N, *shape]. Weight: the members' tensors, not read yet: whoever reads them
    chooses between split and stacked.
    """

    SHARED = "shared"
    SPLIT = "split"
    STACKED = "stacked"
    WEIGHT = "weight"


@dataclass
class Value:
    """A node of the members' graph in the stack.

    Attributes:
        form: The form in which it was computed; the others are made when they are asked for.
        name: Of a weight: its name.
        shared: The node, where it is one for all.
        split: A node (or a constant) for each member.
        stacked: [N, *shape], or a list of such.
    """

    form: Form
    name: str = ""
    shared: Any = None
    split: tuple[Any, ...] | None = None
    stacked: fx.Node | None = None


@dataclass
class Writer:
    """The graph of the stack while it is being written.

    Attributes:
        policy: Which lowerings pay.
        groups_convolutions: Whether convolutions are run for all members at once.
        values: For each node of the members' graph, what stands for it.
        constants: Tensors that the graph reads and no state_dict() has, by name; what is not in it
            is the first member's.
    """

    members: Sequence[Program]
    policy: Policy
    graph: fx.Graph
    weights: Weights
    groups_convolutions: bool = False
    values: dict[fx.Node, Value] = field(default_factory=dict)
    constants: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def n(self) -> int:
        """Number of members."""
        return len(self.members)

    def form(self, node: fx.Node) -> Form:
        """Return the form in which a node was computed."""
        return self.values[node].form

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Write a call."""
        return self.graph.call_function(target, args, kwargs)

    def split(self, node: fx.Node) -> tuple[Any, ...]:
        """Return a value for each member."""
        value = self.values[node]
        if value.split is None:
            if value.form is Form.SHARED:
                value.split = (value.shared,) * self.n
            elif value.form is Form.WEIGHT:
                value.split = tuple(self.weights.own(value.name, i) for i in range(self.n))
            else:
                value.split = tuple(
                    self.call(aten.select.int, value.stacked, 0, i) for i in range(self.n)
                )
        return value.split

    def stacked(self, node: fx.Node) -> fx.Node:
        """Return one tensor, [N, *shape]."""
        value = self.values[node]
        if value.stacked is None:
            if value.form is Form.WEIGHT:
                return self.weight(node, (self.n, *node.meta["val"].shape))
            if value.form is Form.SHARED:
                sizes = [self.n, *(-1 for _ in node.meta["val"].shape)]
                front = self.call(aten.unsqueeze.default, value.shared, 0)
                value.stacked = self.call(aten.expand.default, front, sizes)
            else:
                value.stacked = self.call(aten.stack.default, list(self.split(node)))
        return value.stacked

    def weight(self, node: fx.Node, shape: tuple[int, ...]) -> fx.Node:
        """Read a weight in a shape that is a view of [N, *shape of a member]."""
        return self.weights.stacked(self.values[node].name, shape)

    def shared(self, node: fx.Node) -> Any:
        """Return the one value of a node that is shared."""
        value = self.values[node]
        assert value.form is Form.SHARED, node
        return value.shared

    def broadcast(self, node: fx.Node, rank: int) -> Any:
        """Return a value that meets stacked values [N, *shape] of `rank` member dimensions.

        Shared ones and numbers are the node itself, others [N, 1, ..., *shape].
        """
        value, content = self.values[node], node.meta["val"]
        if value.form is Form.SHARED:
            return value.shared
        missing = rank - content.dim()
        if value.form is Form.WEIGHT:
            return self.weight(node, (self.n, *[1] * missing, *content.shape))
        found = self.stacked(node)
        for _ in range(missing):
            found = self.call(aten.unsqueeze.default, found, 1)
        return found

    def sizes(self, node: fx.Node) -> list[Any]:
        """A member's sizes: numbers, -1 for the only symbolic one, nodes for several of them."""
        shape = node.meta["val"].shape
        symbolic = [d for d, size in enumerate(shape) if not isinstance(size, int)]
        if len(symbolic) < 2:
            return [size if isinstance(size, int) else -1 for size in shape]
        return [
            size if isinstance(size, int) else self.size(node, d) for d, size in enumerate(shape)
        ]

    def size(self, node: fx.Node, dim: int) -> fx.Node:
        """Return the size of a dimension, the same for all members."""
        value = self.values[node]
        if value.form is Form.STACKED:
            return self.call(aten.sym_size.int, value.stacked, dim + (dim >= 0))
        return self.call(aten.sym_size.int, self.split(node)[0], dim)


def is_tensor(node: fx.Node) -> bool:
    """Tell whether a node holds one tensor."""
    return isinstance(node.meta.get("val"), torch.Tensor)


def is_number(node: fx.Node) -> bool:
    """Tell whether a node holds a size or another number, the same for all members."""
    val = node.meta.get("val")
    number = isinstance(val, int | float | torch.SymInt | torch.SymFloat | torch.SymBool)
    return number and not free_unbacked_symbols(val)


def has_data_sizes(node: fx.Node) -> bool:
    """Tell whether a size of a node's tensors depends on data, so that members may differ in it."""
    return any(free_unbacked_symbols(x) for x in tensors_in(node.meta.get("val")))


def arguments(node: fx.Node) -> dict[str, Any]:
    """Return all arguments of an operator by their names in its schema, defaults filled in."""
    return {name: argument(node, name) for name in argument_names(node.target)}


def recall(writer: Writer, node: fx.Node, given: Mapping[str, Any]) -> fx.Node:
    """Write a node's operator with other arguments, by their names in its schema."""
    schema = schema_of(node.target).arguments
    args = [given[a.name] for a in schema if not a.kwarg_only]
    kwargs = {a.name: given[a.name] for a in schema if a.kwarg_only}
    return writer.call(node.target, *args, **kwargs)
