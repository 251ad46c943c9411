"""The concatenated network: all members side by side in one graph (DESIGN.md section 5, "wide").

Every labelled dimension grows; a `Layout` says which copy of which index stands where. Layouts
start at the parameters and flow through the graph: data movement runs on arrays of positions,
everything else hands a layout to whatever carries the same neurons. Shape literals are rewritten
from the labels of their node, never by matching numbers.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any, cast

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import fx

from fxfuse.apply import fused_side_by_side
from fxfuse.coupling import CouplingGraph, Index, Place
from fxfuse.errors import RewriteError
from fxfuse.gather import Movement
from fxfuse.labels import Field, Value, neurons
from fxfuse.layout import Layout, default_layout
from fxfuse.plan import FusionPlan
from fxfuse.rewrite import FusedModule, copy_graph, emit_graph
from fxfuse.rules import (
    contraction,
    movement,
    pointwise,
    recurrent,
    reduction,
    selection,
)
from fxfuse.rules.registry import argument_of, find, hint
from fxfuse.source_lines import source_of

aten = torch.ops.aten

#: Layout of each grown dimension of one tensor.
Layouts = dict[int, Layout]


def widen(
    graph: CouplingGraph, plan: FusionPlan, states: Sequence[Mapping[str, torch.Tensor]]
) -> FusedModule:
    """Emits the concatenation of the members.

    Args:
        graph: The analysis of the members.
        plan: A plan of method `wide`.
        states: For each member, its tensors by name.

    Returns:
        A module whose labelled dimensions are N times as large as a member's.

    Raises:
        RewriteError: An operator's literals or layouts cannot be rewritten; names the node.
    """
    widener = _Widener(graph, plan.n_members)
    widener.run()
    state = fused_side_by_side(graph, plan, states, widener.places)
    return emit_graph(graph.captured, state, widener.graph, widener.orders)


def output_layouts(graph: CouplingGraph, n_members: int) -> list[Layouts]:
    """For each output tensor of the concatenation, the layouts of the dimensions that grow.

    Args:
        graph: The analysis of the members.
        n_members: N.

    Raises:
        RewriteError: As for `widen`.
    """
    widener = _Widener(graph, n_members)
    widener.run()
    outputs = [n for n in graph.captured.outputs() if isinstance(n, fx.Node)]
    return [widener.layout_of(n) for n in outputs if isinstance(graph.values[n], Value)]


class _Widener:
    def __init__(self, analysis: CouplingGraph, n_members: int) -> None:
        self.analysis = analysis
        self.n_members = n_members
        self.component = analysis.ledger.components()
        self.places: dict[Place, Layout] = {}
        self.layouts: dict[fx.Node, Any] = {}
        self.free = self._free_components()
        self.mapping: dict[fx.Node, fx.Node] = {}
        self.orders: dict[str, torch.Tensor] = {}
        self.inputs: dict[tuple[fx.Node, fx.Node], fx.Node] = {}
        self.graph = copy_graph(analysis.captured.graph, self.mapping)

    def _free_components(self) -> frozenset[int]:
        ledger = self.analysis.ledger
        free: set[int] = set()
        for owner, (name, dim) in enumerate(ledger.owners):
            for group in self.analysis.group_of.get((name, dim), ()):
                rows = group.index[(name, dim)].reshape(-1)
                free.update(self.component[ledger.starts[owner] + rows].tolist())
        return frozenset(free)

    def run(self) -> None:
        for node in self.analysis.captured.graph.nodes:
            if node.op == "call_function" and _has_tensor(self.analysis.values[node]):
                self.layouts[node] = self.call(node)
            elif node.op != "output":
                self.layouts[node] = {}

    # --- operators ------------------------------------------------------------------------------

    def call(self, node: fx.Node) -> Any:
        first = node.args[0] if node.args else None
        if isinstance(first, fx.Node) and isinstance(self.layouts.get(first), list):
            return self.layouts[first][node.args[1]]
        rule = find(node.target)
        if rule in (movement.move, movement.view):
            return self.move(node)
        if rule in (selection.index, selection.index_select) and self.is_constant(node.args[1:]):
            return self.move(node)
        if rule is movement.same:
            return self.layout_of(node.args[0])
        if rule in (movement.cat, movement.stack):
            return self.join(node)
        if rule is movement.pad:
            return self.pad(node)
        if rule is movement.overwrite:
            return self.overwrite(node)
        if node.target is aten.glu.default:
            return self.halve(node)
        if rule in (recurrent.layers, recurrent.cell):
            return self.recur(node)
        if rule in (reduction.unfold, reduction.fold):
            return self.fold(node, inverse=rule is reduction.unfold)
        if _groups_of(node) > 1:
            return self.grouped(node)
        result = self.carry(node)
        self.rewrite_literals(node, result)
        return result

    def is_constant(self, args: Any) -> bool:
        """Whether all tensors among some arguments are constants."""
        nodes = [x for x in pytree.tree_leaves(args) if isinstance(x, fx.Node)]
        values = [self.analysis.values[x] for x in nodes]
        return all(v.constant is not None for v in values if isinstance(v, Value))

    def layout_of(self, node: Any) -> Layouts:
        """Layouts of an operand; a parameter that has none yet gets the default ones."""
        if node.op != "get_attr":
            found: Layouts = self.layouts[node]
            return found
        return {
            dim: self.place_layout(place)
            for dim, place in self.parameter_places(node)
            if place in self.analysis.group_of
        }

    def parameter_places(self, node: fx.Node) -> Iterator[tuple[int, Place]]:
        name = self.analysis.captured.canonical.get(str(node.target))
        if name is not None:
            for dim in range(self.analysis.captured.tensor(name).dim()):
                yield dim, (name, dim)

    def place_layout(self, place: Place) -> Layout:
        if place not in self.places:
            self.places[place] = default_layout(self.analysis, place, self.n_members)
        return self.places[place]

    def carry(self, node: fx.Node) -> Any:
        """Hands layouts over to whatever carries the same neurons in the same order."""
        known: dict[bytes, Layout] = {}
        operands = [n for n in node.all_input_nodes if _has_tensor(self.analysis.values[n])]
        for operand in operands:
            if operand.op == "get_attr":
                continue
            for dim, layout in self.layouts[operand].items():
                key = self.order(self.analysis.values[operand], dim)
                if key is not None:
                    self.agree(node, operand, dim, layout, known.setdefault(key, layout))
        for operand in operands:
            if operand.op != "get_attr":
                continue
            for dim, place in self.parameter_places(operand):
                key = self.order(self.analysis.values[operand], dim)
                if key is None:
                    continue
                if place not in self.places and key in known:
                    self.places[place] = known[key]
                layout = self.place_layout(place)
                self.agree(node, operand, dim, layout, known.setdefault(key, layout))
        value = self.analysis.values[node]
        if isinstance(value, list):
            return [self.handed(node, part, known) for part in value]
        result = self.handed(node, value, known)
        if find(node.target) is contraction.addmm:
            self.broadcast(node, operands[:1], result)
        elif find(node.target) is pointwise.pointwise or pointwise.is_pointwise(node.target):
            self.broadcast(node, operands, result)
        return result

    def broadcast(self, node: fx.Node, operands: Sequence[fx.Node], result: Layouts) -> None:
        """An operand that is the same for all neurons of a dimension keeps one of them there."""
        value: Value = self.analysis.values[node]
        for operand in operands:
            own: Value = self.analysis.values[operand]
            layouts = self.layout_of(operand)
            for dim, layout in result.items():
                place = dim - value.rank + own.rank
                size = value.shape[dim]
                if place < 0 or place in layouts or layout.size == size:
                    continue
                if own.shape[place] == size and place not in own.unlabelled:
                    current = self.inputs.get((node, operand), self.mapping[operand])
                    with self.graph.inserting_before(self.mapping[node]):
                        args = (current, place, 0, 1)
                        one = self.graph.call_function(aten.slice.Tensor, args)
                    self.mapping[node].replace_input_with(current, one)
                    self.inputs[(node, operand)] = one

    def handed(self, node: fx.Node, value: Value, known: Mapping[bytes, Layout]) -> Layouts:
        """Layouts of a result that carries the neurons of operands."""
        result: Layouts = {}
        for dim in range(value.rank):
            key = self.order(value, dim)
            if key is not None and key in known:
                result[dim] = known[key]
        return self.complete(node, value, result)

    def agree(
        self, node: fx.Node, operand: fx.Node, dim: int, layout: Layout, wanted: Layout
    ) -> None:
        """Brings one dimension of an operand into the order that a node needs."""
        if _same(layout, wanted):
            return
        have = {pair: i for i, pair in enumerate(_pairs(layout))}
        if operand.op != "get_attr":
            have = self.with_shared(operand, dim, layout) | have
        elsewhere = set(_pairs(layout)) - set(_pairs(wanted))
        lost = any((source, -1) not in have for source, _ in elsewhere)
        if lost or not have.keys() >= set(_pairs(wanted)):
            raise self.error(node, "two operands carry different copies of the same neurons")
        self.pick(node, operand, dim, [have[pair] for pair in _pairs(wanted)])

    def with_shared(self, operand: fx.Node, dim: int, layout: Layout) -> dict[tuple[int, int], int]:
        """Where an activation's neurons stand that do not grow: any copy of them is the others."""
        value: Value = self.analysis.values[operand]
        line = next(_line(f, dim) for f in value.fields if dim in f.dims)
        grows = np.isin(self.component[line], list(self.free))
        copies = (-1, *range(self.n_members))
        return {
            (source, copy): place
            for place, source in reversed(list(enumerate(layout.source.tolist())))
            if not grows[source]
            for copy in copies
        }

    def pick(self, node: fx.Node, operand: fx.Node, dim: int, places: Sequence[int]) -> None:
        """Puts an `index_select` between an operand and a node."""
        current = self.inputs.get((node, operand), self.mapping[operand])
        ordered = self.select(node, current, dim, places)
        self.mapping[node].replace_input_with(current, ordered)
        self.inputs[(node, operand)] = ordered

    def spread(self, node: fx.Node, operand: fx.Node, dim: int, wanted: Layout) -> None:
        """An operand gets the layout that a node needs; one without neurons there is repeated."""
        have = self.layout_of(operand).get(dim)
        size = self.analysis.values[operand].shape[dim]
        if have is not None:
            self.agree(node, operand, dim, have, wanted)
        elif size > 1:
            self.pick(node, operand, dim, wanted.source.tolist())

    def select(self, node: fx.Node, tensor: fx.Node, dim: int, places: Sequence[int]) -> fx.Node:
        """Writes an index_select before a node; returns it."""
        name = f"_fxfuse_order_{len(self.orders)}"
        self.orders[name] = torch.tensor(places)
        with self.graph.inserting_before(self.mapping[node]):
            order = self.graph.get_attr(name)
            return self.graph.call_function(aten.index_select.default, (tensor, dim, order))

    def halve(self, node: fx.Node) -> Layouts:
        """Gated linear units: the first half of the layout has to be the order of both halves."""
        x = cast("fx.Node", node.args[0])
        value: Value = self.analysis.values[x]
        dim = int(_argument(node, "dim")) % value.rank
        result = dict(self.layouts[x])
        layout = result.get(dim)
        if layout is not None:
            half = value.shape[dim] // 2
            result[dim] = layout.head(half)
            both = Layout(
                np.concatenate([result[dim].source, result[dim].source + half]),
                np.tile(result[dim].copy, 2),
            )
            self.agree(node, x, dim, layout, both)
        return result

    # --- recurrent layers and patches -----------------------------------------------------------

    def recur(self, node: fx.Node) -> Any:
        """Recurrent layers: every gate has its rows in the order of the units."""
        x, hx, *rest = cast("tuple[Any, ...]", node.args)
        states: list[fx.Node] = list(hx) if isinstance(hx, list | tuple) else [hx]
        is_cell = find(node.target) is recurrent.cell
        if is_cell:
            parts = [recurrent.Weights(rest[0], rest[1], tuple(b for b in rest[2:] if b))]
            directions = 1
        else:
            directions = 2 if _argument(node, "bidirectional") else 1
            parts = recurrent.weights_of(
                rest[0],
                has_biases=_argument(node, "has_biases"),
                parts=directions * _argument(node, "num_layers"),
            )
        last = self.analysis.values[x].rank - 1
        incoming = self.layout_of(x).get(last)
        if set(self.layout_of(x)) - {last}:
            raise self.error(node, "a recurrent layer whose batch holds neurons is not rewritten")
        kept: list[list[Layout]] = [[] for _ in states]
        for start in range(0, len(parts), directions):
            outgoing: list[Layout] = []
            for part in parts[start : start + directions]:
                both = self.direction(node, part, incoming)
                outgoing.append(both[0])
                for found, layout in zip(kept, both, strict=False):
                    found.append(layout)
            incoming = outgoing[0]
            for layout in outgoing[1:]:
                incoming = layout.after(incoming, int(incoming.source.max()) + 1)
        # One tensor may be both states.
        for state, layouts in dict(zip(states, kept, strict=True)).items():
            if not all(_same(layout, layouts[0]) for layout in layouts):
                raise self.error(node, "one state holds layers that grow differently")
            self.spread(node, state, self.analysis.values[state].rank - 1, layouts[0])
        ends = [layouts[0] for layouts in kept]
        if is_cell:
            grown = [{last: end} for end in ends]
            return grown if isinstance(self.analysis.values[node], list) else grown[0]
        return [{last: incoming}, *({last: end} for end in ends)]

    def direction(
        self, node: fx.Node, part: recurrent.Weights, incoming: Layout | None
    ) -> tuple[Layout, Layout]:
        """Brings the parameters of one direction into order; layouts of both of its states."""
        gates = recurrent.GATES[node.target]
        inner: Value = self.analysis.values[part.inner]
        size = inner.shape[0] // gates
        units = hidden = self.copied(inner, 0, np.arange(size))
        rows = units
        for gate in range(1, gates):
            rows = units.after(rows, gate * size)
        self.require(node, part.inner, 0, rows)
        self.require(node, part.inner, 1, incoming)
        for operand in (part.recurrent, *part.biases):
            self.require(node, operand, 0, rows)
        if part.projection is not None:
            value: Value = self.analysis.values[part.projection]
            hidden = self.copied(value, 0, np.arange(value.shape[0]))
            self.require(node, part.projection, 0, hidden)
            self.require(node, part.projection, 1, units)
        self.require(node, part.recurrent, 1, hidden)
        return hidden, units

    def fold(self, node: fx.Node, *, inverse: bool) -> Layouts:
        """Patches: the pixels of a channel stand together in a column."""
        x = cast("fx.Node", node.args[0])
        before, after = self.analysis.values[x], self.analysis.values[node]
        column, channel = (
            (after.rank - 2, before.rank - 3) if inverse else (before.rank - 2, after.rank - 3)
        )
        size = (
            after.shape[column] // before.shape[channel]
            if inverse
            else before.shape[column] // after.shape[channel]
        )
        result = {d: layout for d, layout in self.layouts[x].items() if d < min(column, channel)}
        layout = self.layouts[x].get(channel if inverse else column)
        if layout is not None and inverse:
            result[column] = layout.repeated(size)
        elif layout is not None:
            wanted = layout.by_block(size)
            self.agree(node, x, column, layout, wanted)
            result[channel] = Layout(wanted.source[::size] // size, wanted.copy[::size])
        return self.complete(node, after, result)

    # --- groups of channels ---------------------------------------------------------------------

    def grouped(self, node: fx.Node) -> Layouts:
        """Grouped convolution and normalisation: channels of a group have to stand together."""
        x = cast("fx.Node", node.args[0])
        value, result = self.analysis.values[x], self.analysis.values[node]
        is_norm = node.target is aten.group_norm.default
        weight = None if is_norm else cast("fx.Node", node.args[1])
        space = value.rank - 2 if weight is None else self.analysis.values[weight].rank - 2
        dim, groups = value.rank - space - 1, _groups_of(node)
        layout = self.layouts[x].get(dim)
        copies = self.copies_of_groups(node, value, dim, layout)
        if weight is not None and self.order(self.analysis.values[weight], 1) is not None:
            copies = copies if _is_transposed(node) else None
        if copies is None:
            # The groups stay as many; what grows is the number of channels in each of them.
            wanted = None if layout is None else layout.by_index()
            grows = self.order(result, dim) is not None
            out = _by_index(result.shape[dim], self.n_members) if grows else None
            inner = None if wanted is None else wanted.head(value.shape[dim] // groups)
            if _is_transposed(node):
                inner = None if out is None else out.head(result.shape[dim] // groups)
        else:
            wanted = _by_group(copies, value.shape[dim] // groups)
            out, inner = _by_group(copies, result.shape[dim] // groups), None
            self.set_argument(node, "num_groups" if is_norm else "groups", sum(map(len, copies)))
        if layout is not None and wanted is not None:
            self.agree(node, x, dim, layout, wanted)
        for name, dims in (
            ("weight", (wanted, inner) if _is_transposed(node) else (out, inner)),
            ("bias", (out,)),
        ):
            operand = _argument(node, name)
            if isinstance(operand, fx.Node):
                for d, needed in enumerate(dims[:1] if is_norm else dims):
                    self.require(node, operand, d, needed)
        return self.complete(node, result, {} if out is None else {dim: out})

    def copies_of_groups(
        self, node: fx.Node, value: Value, dim: int, layout: Layout | None
    ) -> list[list[int]] | None:
        """Which members' copies each group has; None if it is not groups that are copied."""
        groups = _groups_of(node)
        line = next((_line(f, dim) for f in value.fields if dim in f.dims), None)
        if layout is None or line is None:
            return None
        units = self.component[line].reshape(groups, -1)
        if not bool((units == units[:, :1]).all()):
            return None
        group = layout.source // units.shape[1]
        return [np.unique(layout.copy[group == g]).tolist() for g in range(groups)]

    def require(self, node: fx.Node, operand: fx.Node, dim: int, wanted: Layout | None) -> None:
        """An operand has to have a layout along a dimension."""
        if operand.op == "get_attr" and wanted is not None:
            place = dict(self.parameter_places(operand)).get(dim)
            if place is not None and place in self.analysis.group_of:
                self.places.setdefault(place, wanted)
        have = self.layout_of(operand).get(dim)
        size = self.analysis.values[operand].shape[dim]
        if have is not None and wanted is not None:
            self.agree(node, operand, dim, have, wanted)
        elif have is not None or (wanted is not None and wanted.size != size):
            raise self.error(node, "a parameter does not grow with the groups of its channels")

    def complete(self, node: fx.Node, value: Value, result: Layouts) -> Layouts:
        for f in value.fields:
            free = set(self.component[neurons(f.ids).reshape(-1).numpy()].tolist()) & self.free
            if free and not set(f.dims) & set(result):
                raise self.error(node, "no operand tells the order of its neurons")
        return result

    def order(self, value: Value, dim: int) -> bytes | None:
        """Which neurons stand along a dimension, if the dimension is one that grows."""
        for f in value.fields:
            if dim in f.dims:
                line = _line(f, dim)
                units = self.component[line]
                if len(np.unique(units)) > 1 or f.dims == (dim,):
                    if self.free.isdisjoint(units.tolist()):
                        continue
                    return units.tobytes()
                if self.is_one_unit(f):
                    # No dimension tells units apart, so the label says which one it is.
                    return units.tobytes() + bytes([value.rank - dim])
        return None

    def is_one_unit(self, f: Field) -> bool:
        units = np.unique(self.component[neurons(f.ids).numpy()])
        return len(units) == 1 and int(units[0]) in self.free

    # --- data movement --------------------------------------------------------------------------

    def move(self, node: fx.Node) -> Any:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        value: Value = self.analysis.values[source]
        layouts = self.layout_of(source)
        if not layouts:
            return pytree.tree_map(
                lambda _: {}, self.analysis.values[node], is_leaf=lambda x: isinstance(x, Value)
            )
        narrow = self.evaluate(node, node.args, _places(value, {})[0])
        # The order that the operand happens to have, else one in which copies stand together.
        for ordered in ({}, *self.reorderings(value, layouts)):
            tried = {**layouts, **ordered}
            place, copy = _places(value, tried)
            for args in self.candidates(node, value, tried):
                try:
                    moved = self.evaluate(node, args, place)
                    copies = self.evaluate(node, args, copy)
                except RuntimeError:
                    # These sizes do not fit: the next candidate.
                    continue
                if len(_list(moved)) != len(_list(narrow)):
                    continue
                parts = zip(_list(narrow), _list(moved), _list(copies), strict=True)
                found = [_match(*part) for part in parts]
                if self.keeps_units_apart(node, found):
                    self.set_literals(node, args)
                    self.reorder(node, layouts, ordered)
                    return found if isinstance(self.analysis.values[node], list) else found[0]
        return self.gather(node, source, value, layouts)

    def gather(self, node: fx.Node, source: fx.Node, value: Value, have: Layouts) -> Any:
        """Writes a movement that no literals describe as a gather from the flat operand."""
        results, operator_node = self.analysis.values[node], self.mapping[node]
        layouts: list[Layouts] = []
        for place, part in enumerate(_list(results)):
            old = node
            if isinstance(results, list):
                users = [user for user in node.users if user.args[1] == place]
                if not users:
                    layouts.append({})
                    continue
                old = users[0]
            fields = {d: f for f in part.fields if (d := self.growing(f)) is not None}
            want = {dim: self.copies(f, dim) for dim, f in fields.items()}

            def move(tensor: torch.Tensor, place: int = place) -> torch.Tensor:
                found: torch.Tensor = _list(self.evaluate(node, node.args, tensor))[place]
                return found

            twin = {}
            for dim in have:
                f = next(f for f in value.fields if dim in f.dims and self.growing(f) is not None)
                moved = self.free_units(Field(move(f.ids.expand(value.shape)), ()))
                for d, g in fields.items():
                    # Where nothing is free, nothing has copies.
                    units = self.free_units(g)
                    if bool(((units == moved) | (moved < 0)).all()):
                        twin[dim] = d
            movement = Movement(move, value.shape, have, want, twin)
            written = self.write(node, source, old, movement)
            replaced, self.mapping[old] = self.mapping[old], written
            replaced.replace_all_uses_with(written)
            if old is not node:
                self.graph.erase_node(replaced)
            layouts.append(want)
        self.graph.erase_node(operator_node)
        return layouts if isinstance(results, list) else layouts[0]

    def free_units(self, f: Field) -> Index:
        """The unit of each place of a field; -1 where it is none that grows."""
        units = self.component[neurons(f.ids).numpy()]
        return np.where(np.isin(units, list(self.free)), units, -1)

    def growing(self, f: Field) -> int | None:
        """The dimension along which a field grows when it is given a new layout."""
        units = self.free_units(f)
        if bool((units < 0).all()):
            return None
        rows = {d: np.moveaxis(units, d, 0).reshape(units.shape[d], -1) for d in f.dims}
        # Copies of whole rows: best where a row is free or not as a whole, and tells units apart.
        return max(
            f.dims,
            key=lambda d: (
                bool(((rows[d] < 0) == (rows[d][:, :1] < 0)).all()),
                len(np.unique(rows[d][:, 0])) > 1,
            ),
        )

    def copies(self, f: Field, dim: int) -> Layout:
        """The copies of each run of a unit's neurons next to each other."""
        units = np.moveaxis(self.free_units(f), dim, 0).reshape(f.ids.shape[dim], -1).max(axis=1)
        runs = np.flatnonzero(np.r_[True, (units[1:] != units[:-1]) | (units[1:] < 0)])
        source, copy = [], []
        for start, end in pairwise([*runs.tolist(), len(units)]):
            members = np.array([-1]) if units[start] < 0 else np.arange(self.n_members)
            source.append(np.tile(np.arange(start, end), len(members)))
            copy.append(np.repeat(members, end - start))
        return Layout(np.concatenate(source), np.concatenate(copy))

    def write(self, node: fx.Node, source: fx.Node, result: fx.Node, movement: Movement) -> fx.Node:
        """Writes a movement as `index_select` of the flat operand, sample by sample."""
        before, after = (_symbolic(n.meta["val"]) for n in (source, result))
        one = len(before) == len(after) == 1
        if (before or after) and not (one and movement.kept(before[0], after[0])):
            raise self.error(node, "it moves neurons between samples")
        index, size = movement.index(before[0] if before else None)
        if before:
            index = index.select(after[0], 0)
        if bool((index < 0).any()):
            raise self.error(node, "a copy of a neuron is missing")
        name = f"_fxfuse_order_{len(self.orders)}"
        self.orders[name] = index.reshape(-1)
        shape, lead = list(index.shape), [-1] if before else []
        with self.graph.inserting_before(self.mapping[result]):
            call, x = self.graph.call_function, self.mapping[source]
            if before:
                x = call(aten.movedim.int, (x, before[0], 0))
            x = call(aten.reshape.default, (x, [*lead, size]))
            order = self.graph.get_attr(name)
            x = call(aten.index_select.default, (x, len(lead), order))
            x = call(aten.reshape.default, (x, [*lead, *shape]))
            return call(aten.movedim.int, (x, 0, after[0])) if before else x

    def keeps_units_apart(self, node: fx.Node, found: Sequence[Layouts | None]) -> bool:
        """Whether the results are made of whole copies, and grow where units differ."""
        values = _list(self.analysis.values[node])
        return all(
            layouts is not None and all(self.order(value, dim) is not None for dim in layouts)
            for value, layouts in zip(values, found, strict=True)
        )

    def reorderings(self, value: Value, layouts: Layouts) -> Iterator[Layouts]:
        """Layouts in which the copies of an index, or of a run of a unit's, stand together."""
        ordered: Layouts = {}
        for dim, layout in layouts.items():
            ordered[dim] = layout.by_index()
        yield ordered
        blocks: Layouts = {}
        for dim, layout in layouts.items():
            line = next((_line(f, dim) for f in value.fields if dim in f.dims), None)
            if line is None:
                return
            units = self.component[line]
            run = np.cumsum(np.r_[0, units[1:] != units[:-1]])
            by_run = np.lexsort((layout.source, layout.copy, run[layout.source]))
            blocks[dim] = Layout(layout.source[by_run], layout.copy[by_run])
        yield blocks
        for dim, layout in layouts.items():
            for size in range(2, value.shape[dim]):
                if value.shape[dim] % size == 0:
                    yield {dim: layout.by_block(size)}

    def reorder(self, node: fx.Node, layouts: Layouts, ordered: Layouts) -> None:
        """Puts index_select nodes between a node and its operand."""
        operand = cast("fx.Node", self.mapping[node].args[0])
        for dim, wanted in ordered.items():
            have = {pair: i for i, pair in enumerate(_pairs(layouts[dim]))}
            operand = self.select(node, operand, dim, [have[pair] for pair in _pairs(wanted)])
        self.mapping[node].update_arg(0, operand)

    def evaluate(self, node: fx.Node, args: Any, tensor: torch.Tensor) -> Any:
        rest = pytree.tree_map(self.concrete, tuple(args[1:]))
        kwargs = pytree.tree_map(self.concrete, dict(node.kwargs))
        target: Any = aten.reshape.default if find(node.target) is movement.view else node.target
        return target(tensor, *rest, **kwargs)

    def concrete(self, x: Any) -> Any:
        if isinstance(x, _Product):
            return self.concrete(x.size) * x.factor
        if not isinstance(x, fx.Node):
            return x
        value = self.analysis.values[x]
        return value.constant if isinstance(value, Value) else hint(value)

    def candidates(
        self, node: fx.Node, value: Value, layouts: Layouts
    ) -> Iterator[tuple[Any, ...]]:
        """Arguments that the operator could have in the concatenated network."""
        args = node.args
        is_view = find(node.target) is movement.view or node.target is aten.expand.default
        if is_view or node.target is aten.unflatten.int:
            place = 1 if is_view else 2
            sizes = list(args[place])  # type: ignore[arg-type]
            # Unflattening writes the sizes of one dimension only.
            written = range(value.rank) if is_view else [_dimension(node, value.rank)]
            growth = [
                lay.size // value.shape[dim] for dim, lay in layouts.items() if dim in written
            ]
            for dims in combinations(range(len(sizes)), len(growth)):
                grown = list(sizes)
                for d, factor in zip(dims, growth, strict=True):
                    grown[d] = _times(grown[d], factor)
                yield (*args[:place], grown, *args[place + 1 :])
            return
        dim = _dimension(node, value.rank)
        if node.target in (aten.slice.Tensor, aten.narrow.default) and dim in layouts:
            yield from self.slices(node, layouts[dim])
            return
        if node.target in (aten.split_with_sizes.default,) and dim in layouts:
            ends = np.cumsum([0, *cast("Sequence[int]", args[1])]).tolist()
            origin = layouts[dim].source
            sizes = [int(((origin >= a) & (origin < b)).sum()) for a, b in pairwise(ends)]
            yield (args[0], sizes, *args[2:])
            return
        if node.target is aten.split.Tensor and dim in layouts:
            factor = layouts[dim].size // value.shape[dim]
            yield (args[0], int(args[1]) * factor, *args[2:])  # type: ignore[arg-type]
            return
        yield tuple(args)

    def slices(self, node: fx.Node, layout: Layout) -> Iterator[tuple[Any, ...]]:
        """The wide range that holds exactly the copies of a narrow range (steps of 1)."""
        size = int(layout.source.max()) + 1
        kept = self.evaluate(node, (None, 0, *node.args[2:]), torch.arange(size)).numpy()
        inside = np.flatnonzero(np.isin(layout.source, kept))
        start, end = int(inside.min()), int(inside.max()) + 1
        last = end if node.target is aten.slice.Tensor else end - start
        if len(inside) == end - start:
            yield (node.args[0], node.args[1], start, last)

    def join(self, node: fx.Node) -> Layouts:
        """Concatenation: layouts along the joined dimension follow each other."""
        joined = cast("Sequence[fx.Node]", node.args[0])
        parts = [n for n in joined if self.analysis.values[n].shape != (0,)]
        dim = _dimension(node, self.analysis.values[node].rank)
        return self.joined(node, parts, dim, stacks=find(node.target) is movement.stack)

    def joined(self, node: fx.Node, parts: Sequence[fx.Node], dim: int, *, stacks: bool) -> Layouts:
        """Layouts of parts that follow each other along a dimension."""
        result: Layouts = {}
        lines, copies, offset, grows = [], [], 0, False
        for part in parts:
            layouts = self.layout_of(part)
            size = 1 if stacks else self.analysis.values[part].shape[dim]
            layout = None if stacks else layouts.get(dim)
            grows |= layout is not None
            lines.append(offset + (layout.source if layout else np.arange(size)))
            copies.append(layout.copy if layout else np.full(size, -1))
            offset += size
            for d, other in layouts.items():
                shifted = d + 1 if stacks and d >= dim else d
                if shifted != dim:
                    self.agree(node, part, d, other, result.setdefault(shifted, other))
        for part in parts:
            known = self.layout_of(part)
            for d, layout in result.items():
                own = d - 1 if stacks and d > dim else d
                if own not in known:
                    self.spread(node, part, own, layout)
        if grows:
            result[dim] = Layout(np.concatenate(lines), np.concatenate(copies))
        return result

    def overwrite(self, node: fx.Node) -> Layouts:
        """A part is replaced: what is left of the whole, and the part, in the order of both."""
        whole, part = cast("tuple[fx.Node, fx.Node]", node.args[:2])
        value: Value = self.analysis.values[node]
        dim = _dimension(node, value.rank)
        result = self.joined(node, [whole, part], dim, stacks=False)
        have = result.pop(dim, None)
        if have is None:
            return result
        size = value.shape[dim]
        places = torch.arange(size + self.analysis.values[part].shape[dim])
        ends = [_argument(node, name) for name in ("start", "end", "step")]
        origin = aten.slice_scatter.default(places[:size], places[size:], 0, *ends)
        rows = [np.flatnonzero(have.source == place) for place in origin.tolist()]
        order = np.concatenate(rows)
        name = f"_fxfuse_order_{len(self.orders)}"
        self.orders[name] = torch.from_numpy(order)
        replaced = self.mapping[node]
        pieces = [self.inputs.get((node, n), self.mapping[n]) for n in (whole, part)]
        with self.graph.inserting_before(replaced):
            both = self.graph.call_function(aten.cat.default, (pieces, dim))
            places_node = self.graph.get_attr(name)
            written = self.graph.call_function(aten.index_select.default, (both, dim, places_node))
        replaced.replace_all_uses_with(written)
        self.graph.erase_node(replaced)
        self.mapping[node] = written
        result[dim] = Layout(np.repeat(np.arange(size), [len(r) for r in rows]), have.copy[order])
        return result

    def pad(self, node: fx.Node) -> Layouts:
        """Padding: a padded place that grows is padded once for each member."""
        source = cast("fx.Node", node.args[0])
        value: Value = self.analysis.values[node]
        layouts = self.layout_of(source)
        amounts = list(_argument(node, "pad"))
        result: Layouts = {}
        for dim in range(value.rank):
            if self.order(value, dim) is None:
                continue
            at = 2 * (value.rank - 1 - dim)
            before, after = amounts[at : at + 2] or (0, 0)
            if not (before or after):
                if dim in layouts:
                    result[dim] = layouts[dim]
                continue
            if min(before, after) < 0:
                raise self.error(node, "negative padding cuts neurons off")
            size = self.analysis.values[source].shape[dim]
            inner = layouts.get(dim, Layout(np.arange(size), np.full(size, -1)))
            first = self.copied(value, dim, np.arange(before))
            last = self.copied(value, dim, np.arange(before + size, before + size + after))
            result[dim] = Layout(
                np.concatenate([first.source, before + inner.source, last.source]),
                np.concatenate([first.copy, inner.copy, last.copy]),
            )
            amounts[at : at + 2] = [first.size, last.size]
        if result:
            self.set_argument(node, "pad", amounts)
        return result

    def copied(self, value: Value, dim: int, indices: Index) -> Layout:
        """Layout of some places: copies next to each other, one where nothing grows."""
        line = next((_line(f, dim) for f in value.fields if dim in f.dims), None)
        units = self.component[line[indices]] if line is not None else np.full(len(indices), -1)
        grows = np.isin(units, list(self.free))
        repeats = np.where(grows, self.n_members, 1)
        copy = [np.arange(n) if n > 1 else np.array([-1]) for n in repeats]
        none = np.empty(0, dtype=np.int64)
        return Layout(np.repeat(indices, repeats), np.concatenate([none, *copy]))

    # --- literals -------------------------------------------------------------------------------

    def rewrite_literals(self, node: fx.Node, result: Layouts) -> None:
        """Literals of operators that are no data movement: normalised shapes."""
        if node.target in (aten.layer_norm.default, aten.rms_norm.default):
            value: Value = self.analysis.values[node]
            shape = list(node.args[1])  # type: ignore[arg-type]
            first = value.rank - len(shape)
            for dim, layout in result.items():
                if dim >= first:
                    shape[dim - first] = layout.size
            self.set_argument(node, "normalized_shape", shape)

    def set_argument(self, node: fx.Node, name: str, value: Any) -> None:
        target = self.mapping[node]
        names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
        position = names.index(name)
        if position < len(target.args):
            target.update_arg(position, value)
        else:
            target.update_kwarg(name, value)

    def set_literals(self, node: fx.Node, args: Sequence[Any]) -> None:
        target = self.mapping[node]

        def literal(x: Any) -> Any:
            if isinstance(x, _Product):
                with self.graph.inserting_before(target):
                    return self.graph.call_function(operator.mul, (literal(x.size), x.factor))
            return self.mapping[x] if isinstance(x, fx.Node) else x

        target.args = tuple(pytree.tree_map(literal, list(args)))

    def error(self, node: fx.Node, why: str) -> RewriteError:
        return RewriteError(
            "the concatenated network cannot be written",
            where=f"{node.name} [{node.target}]  {source_of(node)}".rstrip(),
            why=why,
            how="fuse at member width, which needs no rewriting of shapes",
        )


def _has_tensor(value: Any) -> bool:
    leaves = pytree.tree_leaves(value, is_leaf=lambda x: isinstance(x, Value))
    return any(isinstance(x, Value) for x in leaves)


def _line(f: Field, dim: int) -> Index:
    ids = neurons(f.ids)
    for other in f.dims:
        if other != dim:
            ids = ids.amax(other, keepdim=True)
    line: Index = ids.reshape(-1).numpy()
    return line


#: Copy numbers of the grown dimensions are digits of one number to this base (0: no copy).
_BASE = 1 << 20


def _places(value: Value, layouts: Layouts) -> tuple[torch.Tensor, torch.Tensor]:
    """For each element: the member's element of which it is a copy, and the copies' numbers."""
    place = torch.arange(int(np.prod(value.shape))).reshape(value.shape)
    copy = torch.zeros(value.shape, dtype=torch.int64)
    for digit, (dim, layout) in enumerate(layouts.items()):
        source = torch.from_numpy(layout.source)
        place, copy = place.index_select(dim, source), copy.index_select(dim, source)
        line = torch.from_numpy(layout.copy) + 1
        copy = copy + _along(line * _BASE**digit, dim, value.rank)
    return place, copy


def _along(line: torch.Tensor, dim: int, rank: int) -> torch.Tensor:
    return line.reshape([-1 if d == dim else 1 for d in range(rank)])


def _varying_digits(line: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
    """The digits in which the numbers of a line differ."""
    found, digit = [], 0
    while bool(line.any()):
        digits = line % _BASE
        if bool((digits != digits[0]).any()):
            found.append((digit, digits))
        line, digit = line // _BASE, digit + 1
    return found


def _pairs(layout: Layout) -> list[tuple[int, int]]:
    return list(zip(layout.source.tolist(), layout.copy.tolist(), strict=True))


@dataclass(frozen=True)
class _Product:
    """A symbolic size (a batch times heads, say) that grows by a factor."""

    size: fx.Node
    factor: int


def _times(size: Any, factor: int) -> Any:
    if isinstance(size, fx.Node):
        return _Product(size, factor)
    return size * factor if size > 0 else size


def _symbolic(value: Any) -> list[int]:
    """Dimensions whose size is not known before the network runs."""
    sizes: Sequence[Any] = value.shape
    return [d for d, size in enumerate(sizes) if not isinstance(size, int)]


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _same(a: Layout, b: Layout) -> bool:
    return np.array_equal(a.source, b.source) and np.array_equal(a.copy, b.copy)


def _is_transposed(node: fx.Node) -> bool:
    return find(node.target) is contraction.convolution_transposed


def _groups_of(node: fx.Node) -> int:
    if find(node.target) is contraction.convolution or _is_transposed(node):
        return int(_argument(node, "groups"))
    return int(_argument(node, "num_groups")) if node.target is aten.group_norm.default else 1


def _by_group(copies: Sequence[Sequence[int]], size: int) -> Layout:
    """Groups of `size` channels, the copies of a group next to each other."""
    pairs = [(g, copy) for g, group in enumerate(copies) for copy in group]
    source = [np.arange(g * size, (g + 1) * size) for g, _ in pairs]
    return Layout(np.concatenate(source), np.repeat([copy for _, copy in pairs], size))


def _by_index(size: int, n_members: int) -> Layout:
    """Copies of an index next to each other."""
    return Layout(np.repeat(np.arange(size), n_members), np.tile(np.arange(n_members), size))


def _argument(node: fx.Node, name: str) -> Any:
    return argument_of(node, name, node.args, node.kwargs)


def _dimension(node: fx.Node, rank: int) -> int:
    dim = _argument(node, "dim")
    return int(dim) % rank if isinstance(dim, int) else -1


def _again(line: torch.Tensor, copy: torch.Tensor) -> torch.Tensor:
    """How often the same neuron of the same copy stood at an earlier place."""
    pairs, seen = list(zip(line.tolist(), copy.tolist(), strict=True)), Counter[tuple[int, int]]()
    again = []
    for pair in pairs:
        again.append(seen[pair])
        seen[pair] += 1
    return torch.tensor(again)


def _match(narrow: torch.Tensor, moved: torch.Tensor, copies: torch.Tensor) -> Layouts | None:
    """Layouts of a moved tensor, or None when it is no tensor of whole copies."""
    result: Layouts = {}
    if moved.dim() != narrow.dim():
        return None
    grown = [d for d in range(narrow.dim()) if moved.shape[d] != narrow.shape[d]]
    rebuilt, expected = narrow, torch.zeros_like(narrow)
    for dim in grown:
        head = narrow.movedim(dim, 0).reshape(narrow.shape[dim], -1)[:, 0]
        line = moved.movedim(dim, 0).reshape(moved.shape[dim], -1)[:, 0].contiguous()
        varying = _varying_digits(copies.movedim(dim, 0).reshape(moved.shape[dim], -1)[:, 0])
        if len(varying) != 1:
            return None
        digit, copy = varying[0]
        # The second place of a neuron is the second place of each of its copies.
        ordered, order = head.sort(stable=True)
        found = torch.searchsorted(ordered, line) + _again(line, copy)
        source = order[found.clamp(max=len(head) - 1)]
        if not torch.equal(head[source], line):
            return None
        result[dim] = Layout(source.numpy(), copy.numpy() - 1)
        rebuilt = rebuilt.index_select(dim, source)
        expected = expected.index_select(dim, source)
        expected = expected + _along(copy * _BASE**digit, dim, narrow.dim())
    if torch.equal(rebuilt, moved) and torch.equal(expected, copies):
        return result
    return None
