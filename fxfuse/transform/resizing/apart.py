"""Which operators of a wide model run member by member, so that it is the members' mean exactly.

Told from the labels alone, before anything is written. The members' values of a node are *told
apart* where every index of its value stands along one dimension that grows: each copy is some
member's unit. All other values that depend on members are sums over the members. Such a sum is the
mean where it is the output, and one member's value where its own head computes it. Whatever else
reads a sum, every operator that mixes members, and every operator that reads a tensor of which the
fused network has one for all members, runs *apart*: once for each member, with the member's own
tensors.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator

from torch import fx

from fxfuse.analysis.coupling import CouplingGraph
from fxfuse.analysis.heads import region_of
from fxfuse.analysis.labels import AbstractTensor
from fxfuse.analysis.rules import contraction, find, movement
from fxfuse.errors import RewriteError
from fxfuse.graph.source_lines import source_of
from fxfuse.graph.tensors import is_constant
from fxfuse.planning.plan import FusionPlan
from fxfuse.planning.roles import RoleKind
from fxfuse.transform.layout import Copies, Layout
from fxfuse.transform.resizing.counterparts import Counterparts
from fxfuse.transform.resizing.units import Units, values_in

#: Rules of operators whose result holds nothing but elements of their operands.
_MOVEMENTS = (
    movement.cat,
    movement.move,
    movement.reshaped_as,
    movement.same,
    movement.stack,
    movement.view,
)


class Apart:
    """The part of a wide model that runs member by member.

    Attributes:
        nodes: Nodes of the members' graph that run once for each member.
        tensors: Canonical names of the tensors of which each member has its own.
        counterparts: Where the members' own values stand.
    """

    def __init__(self, graph: CouplingGraph, plan: FusionPlan, copies: Copies) -> None:
        self.graph = graph
        self.n_members = plan.n_members
        self.nodes: set[fx.Node] = set()
        self.tensors: set[str] = set()
        self.counterparts = Counterparts(graph, plan, copies)
        self._units = Units(graph, copies)
        self._heads = region_of(graph.program, graph.program.heads)
        self._whole: dict[fx.Node, bool] = {}
        # What depends on the members, and what depends on the network's inputs as well.
        self._depends: set[fx.Node] = set()
        self._varies: set[fx.Node] = set()
        self._readers: dict[str, list[fx.Node]] = {}
        self._survey()
        for name, role in plan.roles.items():
            # What the plan gives each member already, and what could be one for all of them only.
            if role.kind in (RoleKind.BASE, RoleKind.PER_MEMBER) or role.spread > 0:
                self.add(self._claim(graph.program.canonical[name]))
        noted = {note.node for note in plan.mixing.notes}
        self.add(node for node in graph.program.graph.nodes if node.name in noted)
        means = self._means() | self._heads
        self.add(n for n in self._depends if self._is_sum(n) and n not in means)

    def add(self, nodes: Iterable[fx.Node]) -> None:
        """Let nodes run apart, and whatever has to with them."""
        waiting = list(nodes)
        while waiting:
            node = waiting.pop()
            if node in self.nodes or node.op != "call_function" or not self._values(node):
                continue
            if node in self._heads:
                raise _is_head(node)
            self.nodes.add(node)
            for operand in node.all_input_nodes:
                name = self._own_tensor(operand)
                if name:
                    waiting += self._claim(name)
                elif operand in self._depends and (
                    operand not in self._varies or not self.told_apart(operand)
                ):
                    waiting.append(operand)
            if node not in self._varies or not self.told_apart(node):
                waiting += node.users

    def told_apart(self, node: fx.Node) -> bool:
        """Whether each tensor that a node returns holds the members' values next to each other."""
        if node not in self._whole:
            value = self.graph.values.get(node)
            if isinstance(value, AbstractTensor):
                self._whole[node] = self.layout_of(node) is not None
            else:
                whole = [self._layout(value) is not None for value in self._values(node)]
                self._whole[node] = bool(whole) and all(whole)
        return self._whole[node]

    def layout_of(self, node: fx.Node) -> tuple[int, Layout] | None:
        """The one dimension along which a node's value grows as a whole, and a layout, or None.

        The node returns a tensor. In members of other widths its units have to stand along the same
        dimension.
        """
        found = self._layout(self.graph.values[node])
        if found is None or not self.graph.members:
            return found
        members = range(self.n_members)
        stand = (self.counterparts.places(node, *found, member) is not None for member in members)
        return found if all(stand) else None

    def _layout(self, value: AbstractTensor) -> tuple[int, Layout] | None:
        growing = [(d, f) for f in value.fields if (d := self._units.growing(f)) is not None]
        if len(growing) != 1:
            return None
        dim, f = growing[0]
        layout = self._units.run_layout(f, dim)
        return None if layout is None or bool((layout.copy < 0).any()) else (dim, layout)

    def owns(self, node: fx.Node) -> bool:
        """Tell whether a node reads a tensor of which each member has its own."""
        return self._own_tensor(node) in self.tensors

    def dependent(self, node: fx.Node) -> Iterator[fx.Node]:
        """Return the operands of a node that depend on the members."""
        return (operand for operand in node.all_input_nodes if operand in self._depends)

    # --- what is told from the graph ------------------------------------------------------------

    def _survey(self) -> None:
        for node in self.graph.program.graph.nodes:
            if node.op == "placeholder":
                self._varies.add(node)
            name = self._own_tensor(node)
            if name:
                self._depends.add(node)
                self._readers.setdefault(name, []).extend(node.users)
            for found in (self._depends, self._varies):
                if not found.isdisjoint(node.all_input_nodes):
                    found.add(node)

    def _own_tensor(self, node: fx.Node) -> str:
        """Canonical name of the members' tensor that a node reads; "" for all other nodes."""
        program = self.graph.program
        name = program.canonical.get(str(node.target)) if node.op == "get_attr" else None
        return name if name is not None and not is_constant(program.tensor(name)) else ""

    def _values(self, node: fx.Node) -> list[AbstractTensor]:
        return values_in(self.graph.values.get(node))

    def _claim(self, name: str) -> list[fx.Node]:
        """Give each member a tensor of its own; return the nodes that read it."""
        if name in self.tensors:
            return []
        self.tensors.add(name)
        return self._readers.get(name, [])

    def _is_sum(self, node: fx.Node) -> bool:
        values = node.op == "call_function" and self._values(node)
        return bool(values) and node in self._varies and not self.told_apart(node)

    def _means(self) -> set[fx.Node]:
        """Sums over the members that are their mean, and are handed out as they are."""
        found: set[fx.Node] = set()
        for node in reversed(list(self.graph.program.graph.nodes)):
            if node in self._depends and self._is_sum(node) and node not in self.nodes:
                moves = self._moves(node)
                handed_out = all(
                    user.op == "output" or (user in found and self._moves(user))
                    for user in node.users
                )
                if handed_out and (moves or self._contracts(node)):
                    found.add(node)
        return found

    def _moves(self, node: fx.Node) -> bool:
        """Tell whether a sum is moved: neither sums nor members' own values are put together."""
        moves = node.target is operator.getitem or find(node.target) in _MOVEMENTS
        return moves and not any(
            n in self._depends and not self._is_sum(n) for n in node.all_input_nodes
        )

    def _contracts(self, node: fx.Node) -> bool:
        """Tell whether a node sums the members' units with weights, which hold the 1/N."""
        rule = find(node.target)
        operands = list(self.dependent(node))
        return (
            rule is not None
            and rule.__module__ == contraction.__name__
            and sum(operand in self._varies for operand in operands) == 1
            and all(self.told_apart(n) for n in operands if n in self._varies)
        )


def _is_head(node: fx.Node) -> RewriteError:
    return RewriteError(
        "members cannot run one by one in this network",
        where=f"{node.name} [{node.target}]  {source_of(node)}".rstrip(),
        why="a head mixes neurons of the trunk, or reads what all members share",
        how="use mixing='joint', or heads that begin after this operator",
    )
