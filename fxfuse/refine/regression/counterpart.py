"""Layers of the members' graph in the graph of a fused network of another size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import fx

from fxfuse.activations.layers import layer_at, reads_of
from fxfuse.activations.recurrence import Recurrent, recurrent_at
from fxfuse.graph.capture import Program
from fxfuse.refine.regression.channel import PerChannel, per_channel_at
from fxfuse.refine.regression.fit_target import FitTarget, Norm, norm_of, other_operand, users_of
from fxfuse.refine.regression.work import Work

#: For nodes of the members' graph, the nodes of the other graph that compute the same there.
Nodes = Mapping[fx.Node, fx.Node]


def counterparts(
    program: Program,
    nodes: Nodes,
    routes: Sequence[FitTarget],
    operators: Sequence[PerChannel],
    layers: Sequence[Recurrent] = (),
) -> tuple[list[FitTarget], list[PerChannel], list[Recurrent], list[Work]]:
    """The work of a refit in another graph.

    Args:
        program: A member, whose tensors' names both graphs read.
        nodes: For nodes of its graph, those of the other one.
        routes: `routes_of` the member.
        operators: `per_channel_of` the member.
        layers: `recurrent_of` the member.

    Returns:
        The same routes, operators and recurrent layers, and those that have no counterpart.
    """
    find = _Counterparts(program, nodes, reads_of(program))
    own_routes = {route: find.route(route) for route in routes}
    own_operators = {op: find.per_channel(op) for op in operators}
    own_layers = {work: find.recurrent(work) for work in layers}
    missing: list[Work] = [work for work, own in own_routes.items() if own is None]
    missing += [work for work, own in own_operators.items() if own is None]
    missing += [work for work, own in own_layers.items() if own is None]
    return (
        [own for own in own_routes.values() if own is not None],
        [own for own in own_operators.values() if own is not None],
        [own for own in own_layers.values() if own is not None],
        missing,
    )


class _Counterparts:
    """Finds layers in another graph.

    Between two nodes that have a counterpart, other operators may be there: a gather, or an
    index that brings units into another order. They belong to the way.
    """

    def __init__(self, program: Program, nodes: Nodes, reads: Mapping[str, int]) -> None:
        self.program = program
        self.nodes = nodes
        self.reads = reads

    def route(self, route: FitTarget) -> FitTarget | None:
        """The route of the same layer; to its own output where there is no way to the sum."""
        node = self.nodes.get(route.layer.node)
        layer = None if node is None else layer_at(self.program, node)
        names = route.layer.weight, route.layer.bias
        if layer is None or (layer.weight, layer.bias) != names:
            return None
        norm = None
        if route.norm is not None:
            norm = self._norm(route.norm)
            if norm is None or norm.input is not layer.node:
                return None
        own = FitTarget(layer, norm, (), None, layer.node, route.cut).alone()
        if route.skip is None:
            return own
        way = self._way(own.output, route.aim)
        if way is None:
            return own
        chain, skip, aim = way
        partner = None if route.partner is None else self.route(route.partner)
        if partner is not None and partner.aim is not aim:
            partner = None
        return FitTarget(layer, norm, chain, skip, aim, route.cut, partner)

    def per_channel(self, op: PerChannel) -> PerChannel | None:
        """The same normalisation."""
        node = self.nodes.get(op.node)
        found = None if node is None else per_channel_at(self.program, node, self.reads)
        same = found is not None and (found.weight, found.bias) == (op.weight, op.bias)
        return found if same else None

    def recurrent(self, work: Recurrent) -> Recurrent | None:
        """The same recurrent layers; units may be brought into another order before."""
        node = self.nodes.get(work.node)
        found = None if node is None else recurrent_at(self.program, node, self.reads)
        if found is None or found.tensors != work.tensors:
            return None
        theirs = tuple(self.nodes[read] for read in work.reads if read in self.nodes)
        return replace(found, theirs=theirs) if len(theirs) == len(work.reads) else None

    def _norm(self, norm: Norm) -> Norm | None:
        node = self.nodes.get(norm.node)
        return None if node is None else norm_of(self.program, node, self.reads)

    def _way(
        self, output: fx.Node, aim: fx.Node
    ) -> tuple[tuple[fx.Node, ...], fx.Node, fx.Node] | None:
        """The operators from an output to a sum, the sum's other operand, and the sum."""
        goal, chain, last = self.nodes.get(aim), list[fx.Node](), output
        for user in users_of(output):
            if user is goal:
                skip = other_operand(user, last)
                return None if skip is None else (tuple(chain), skip, user)
            chain.append(user)
            last = user
        return None
