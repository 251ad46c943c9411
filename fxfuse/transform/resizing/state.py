"""The concatenated graph while it is being written: what its handlers share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from fxfuse.analysis.coupling import CouplingGraph, Place
from fxfuse.errors import RewriteError
from fxfuse.graph.source_lines import source_of
from fxfuse.transform.emit import copy_graph, member_name
from fxfuse.transform.layout import Copies, Layout, default_layout
from fxfuse.transform.resizing.apart import Apart
from fxfuse.transform.resizing.gather_index import Move
from fxfuse.transform.resizing.units import Units, values_in

#: Layout of each grown dimension of one tensor.
Layouts = dict[int, Layout]


class ResizedGraph:
    """A copy of the members' graph on its way to the concatenated one.

    Attributes:
        values: The labelled value of each node of the members' graph.
        copies: How many fused units take the place of each unit of a member.
        units: The units, and which of them grow.
        resized: The dimensions of parameters and buffers whose size changes.
        graph: The copy that is rewritten.
        mapping: The node of `graph` that stands for each node of the members' graph.
        places: Layouts of the dimensions of parameters and buffers that were read so far.
        layouts: For each node of the members' graph that was widened, the layouts of its result;
            a list of them where it returns a list.
        orders: Index tensors that `graph` reads, by name.
        inputs: What a node (first) now reads in place of an operand (second).
        pending: Data movements whose result can only be written together with the next one: the
            tensor at which they start, the movements from there at the members' width, and their
            nodes of the members' graph.
        apart: What runs member by member; None where nothing does.
        split: For each node that runs member by member, its nodes of `graph`, one for each member.
    """

    def __init__(self, analysis: CouplingGraph, copies: Copies, apart: Apart | None = None) -> None:
        self.analysis = analysis
        self.values = analysis.values
        self.copies = copies
        self.units = Units(analysis, copies)
        self.resized = frozenset(p for g in analysis.groups if g.name in copies for p in g.index)
        self.places: dict[Place, Layout] = {}
        self.layouts: dict[fx.Node, Any] = {}
        self.orders: dict[str, torch.Tensor] = {}
        self.inputs: dict[tuple[fx.Node, fx.Node], fx.Node] = {}
        self.pending: dict[fx.Node, tuple[fx.Node, Move, tuple[fx.Node, ...]]] = {}
        self.apart = apart
        self.split: dict[fx.Node, list[fx.Node]] = {}
        self._own: dict[tuple[str, int], fx.Node] = {}
        self.mapping: dict[fx.Node, fx.Node] = {}
        self.graph = copy_graph(analysis.program.graph, self.mapping)

    def layout_of(self, node: Any) -> Layouts:
        """Return the layouts of an operand; a parameter that has none yet gets the default ones."""
        if node.op != "get_attr":
            found: Layouts = self.layouts[node]
            return found
        return {
            dim: self.place_layout(place)
            for dim, place in self.parameter_places(node)
            if place in self.resized
        }

    def parameter_places(self, node: fx.Node) -> Iterator[tuple[int, Place]]:
        """Yield each dimension of a parameter or buffer with its place; nothing for a constant."""
        name = self.analysis.program.canonical.get(str(node.target))
        if name is not None:
            for dim in range(self.analysis.program.tensor(name).dim()):
                yield dim, (name, dim)

    def place_layout(self, place: Place) -> Layout:
        """Return the layout of a dimension of a parameter; the default one if it has none yet."""
        if place not in self.places:
            self.places[place] = default_layout(self.analysis, place, self.copies)
        return self.places[place]

    def current(self, node: fx.Node, operand: fx.Node) -> fx.Node:
        """Return what the copy of a node reads at present in place of an operand."""
        return self.inputs.get((node, operand), self.mapping[operand])

    def reroute(self, node: fx.Node, operand: fx.Node, instead: fx.Node) -> None:
        """Make the copy of a node read another node of the copy in place of an operand."""
        self.mapping[node].replace_input_with(self.current(node, operand), instead)
        self.inputs[(node, operand)] = instead

    def hold(self, order: torch.Tensor) -> fx.Node:
        """Keep an index tensor, int64, and write a node that reads it."""
        name = f"_fxfuse_order_{len(self.orders)}"
        self.orders[name] = order
        return self.graph.get_attr(name)

    def own_tensor(self, operand: fx.Node, member: int) -> fx.Node:
        """A node that reads a member's own tensor in place of `operand`, which reads the fused."""
        name = member_name(self.analysis.program, member, str(operand.target))
        if (name, member) not in self._own:
            node = self.graph.get_attr(name)
            node.meta.update(operand.meta)
            self._own[(name, member)] = node
        return self._own[(name, member)]

    def own_tensors(self) -> frozenset[str]:
        """Return the canonical names of the tensors of which each member has its own."""
        return frozenset() if self.apart is None else frozenset(self.apart.tensors)

    def replace(self, node: fx.Node, written: fx.Node) -> fx.Node:
        """Let another node stand for a node of the members' graph; return the one that did."""
        replaced, self.mapping[node] = self.mapping[node], written
        replaced.replace_all_uses_with(written)
        return replaced


def has_tensor(value: Any) -> bool:
    """Tell whether the value of a node is a tensor or holds one."""
    return bool(values_in(value))


def as_list(value: Any) -> list[Any]:
    """Return what a node returns, as a list also where it is one thing."""
    return list(value) if isinstance(value, list | tuple) else [value]


def cannot_write(node: fx.Node, why: str) -> RewriteError:
    """Return the error that names a node of the members' graph that cannot be widened."""
    return RewriteError(
        "the concatenated network cannot be written",
        where=f"{node.name} [{node.target}]  {source_of(node)}".rstrip(),
        why=why,
        how="fuse at a member's width, where no shape changes",
    )
