"""Coupling: the units and groups of a network, what is frozen and why, and who couples whom."""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple, TypeGuard, overload

import networkx as nx
import numpy as np
from torch import fx, nn
from torch.export import ExportedProgram

from fxfuse.analysis.constraints import (
    Asked,
    Constraints,
    asked_for,
    interface_dims,
)
from fxfuse.analysis.coupling_constraints import CouplingConstraints
from fxfuse.analysis.explain import Explainer
from fxfuse.analysis.freezing import (
    FrozenComponents,
    FrozenReason,
    excused,
    frozen_components,
    frozen_places,
)
from fxfuse.analysis.gaps import WithoutRule, without_rule
from fxfuse.analysis.grouping import CouplingGroup, form_groups
from fxfuse.analysis.interpreter import interpret
from fxfuse.analysis.labels import AbstractTensor, Index, Kind, Place
from fxfuse.analysis.mixing import MixingNote, mixing_notes, shared_writers, tied_outputs
from fxfuse.common.readable import Description, Readable, counted
from fxfuse.graph.arguments import argument
from fxfuse.graph.capture import Program, capture
from fxfuse.graph.operator_facts import FACTS, Convolution, Normalisation, OperatorFacts
from fxfuse.graph.source_lines import at_line, source_of

# What an analysis consists of is imported from here, whichever file makes it.
__all__ = [
    "CouplingGraph",
    "CouplingGroup",
    "FrozenReason",
    "Index",
    "MixingNote",
    "Place",
    "WithoutRule",
    "analyze",
    "couple",
    "hands_out",
]


@dataclass(frozen=True, repr=False)
class CouplingGraph(Readable):
    """The result of `analyze`.

    Attributes:
        program: The captured network.
        groups: Coupling groups.
        frozen: Reason for every place that is frozen, wholly or in part.
        mixing: Operators that mix members.
        free_fraction: Share of parameter elements that lie in tensors with at least one free
            dimension, of those that the graph reads. Free means two units or more: nothing can
            permute or prune a single one.
        constraints: What was asked for.
        asked: The same by canonical tensor name.
        without_rule: Operators without a rule, or without a rule for this use, that labelled
            neurons or parameters met, in graph order.
        members: The analysis of each member where they differ in width; empty elsewhere.
        whole: Of a `trunk()`, the analysis with the members' heads; None: this one is whole.
    """

    program: Program
    groups: tuple[CouplingGroup, ...]
    frozen: Mapping[Place, FrozenReason]
    mixing: tuple[MixingNote, ...]
    free_fraction: float
    readers: frozenset[Place]
    writers: frozenset[Place]
    values: Mapping[fx.Node, Any] = field(repr=False)
    coupling: CouplingConstraints = field(repr=False)
    constraints: Constraints = field(default_factory=Constraints)
    asked: Mapping[str, Asked] = field(default_factory=dict)
    without_rule: tuple[WithoutRule, ...] = ()
    members: tuple[CouplingGraph, ...] = field(default=(), repr=False)
    whole: CouplingGraph | None = field(default=None, repr=False)

    def described(self) -> Description:
        """Return the groups, and what is frozen or mixes members, in a few rows."""
        source = self.program.source
        network = "a network" if source is None else type(source).__name__
        title = f"Coupling graph of {network}: {counted(len(self.groups), 'group')}"
        inside = [reason for reason in self.frozen.values() if not reason.interface]
        whys = Counter((reason.why, reason.source) for reason in inside).most_common()
        frozen = [f"{at_line(counted(n, 'dimension'), line)}: {why}" for (why, line), n in whys]
        return f"{title}, {self.free_fraction:.1%} of the weights are free", {
            "groups": [f"{g.name} ({counted(g.n_units, 'unit')})" for g in self.groups],
            "one unit": [f"{name}: {why}" for name, why in self.single_units.items()],
            "frozen": frozen,
            "mixing": [at_line(note.node, note.source) for note in self.mixing],
            "no rule": [at_line(gap.operator, gap.source) for gap in self.without_rule],
            "constraints": str(self.constraints),
            "members": f"{len(self.members)} of different width" if self.members else "",
        }

    @cached_property
    def single_units(self) -> Mapping[str, str]:
        """The groups of a single unit, by name, and why their neurons do not move by themselves."""
        return {g.name: self._why_single(g) for g in self.groups if g.n_units == 1}

    def _why_single(self, group: CouplingGroup) -> str:
        coupling = self.coupling
        for (name, dim), rows in group.index.items():
            place = (self.program.canonical[name], dim)
            if rows.shape[1] > 1 and place in coupling.owners:
                first, second = coupling.starts[coupling.owners.index(place)] + rows[0, :2]
                node = coupling.joined_by(int(first), int(second))
                if node is not None:
                    return at_line(f"tied to one another by {node.target}", source_of(node))
        return "no other neuron is used alike"

    def of_member(self, member: int) -> CouplingGraph:
        """Return the analysis of a member, whose width may be another one."""
        return self.members[member] if self.members else self

    def units_of(self, group: str, member: int) -> int:
        """Return how many units of a group a member has."""
        return next(g.n_units for g in self.of_member(member).groups if g.name == group)

    def lacking(self, absent: Mapping[str, Collection[int]], member: int) -> frozenset[str]:
        """The groups that a member has no units of, since it lacks the block that they are in."""
        missing = {name for name, members in absent.items() if member in members}
        groups = (g for g in self.groups if all(name in missing for name, _ in g.index))
        return frozenset(g.name for g in groups) if missing else frozenset()

    def rows_of(self, group: str, place: Place) -> Index:
        """Which indices each unit of a group owns in a place, int64 [n_units, slots_per_unit]."""
        return next(g.index[place] for g in self.group_of[place] if g.name == group)

    def node_of(self, node: fx.Node, member: int) -> fx.Node:
        """Return the node of a member's own graph that does what a node of this one does."""
        return self._nodes[member][node] if self.members else node

    @cached_property
    def _nodes(self) -> tuple[Mapping[fx.Node, fx.Node], ...]:
        """For each member, its own nodes: the graphs differ in sizes alone."""
        nodes = list(self.program.graph.nodes)
        each = (member.program.graph.nodes for member in self.members)
        return tuple(dict(zip(nodes, own, strict=True)) for own in each)

    @cached_property
    def group_of(self) -> Mapping[Place, tuple[CouplingGroup, ...]]:
        """The groups that own slots in each place."""
        found: dict[Place, list[CouplingGroup]] = defaultdict(list)
        for group in self.groups:
            for place in group.index:
                found[place].append(group)
        return {place: tuple(groups) for place, groups in found.items()}

    @cached_property
    def _explainer(self) -> Explainer:
        return Explainer(self.program, self.coupling, self.group_of, self.frozen)

    def to_networkx(self) -> nx.Graph:
        """The coupling as a graph: nodes `(tensor, dim)`, edges with the fx nodes that tied them.

        Node attributes: `size`, `groups` (names), `frozen` (why, or ""). Edge attribute
        `nodes`: names of graph nodes, in graph order. Nodes named `<name>` are results of
        operators without a rule.
        """
        return self._explainer.graph.copy()

    @overload
    def explain(self, first: str, second: int) -> str: ...

    @overload
    def explain(self, first: Place, second: Place | None = None) -> str: ...

    def explain(self, first: Any, second: Any = None) -> str:
        """Say in which group a dimension is and why, why it is frozen, or what couples two.

        Args:
            first: A tensor name, or a pair `(tensor, dim)`.
            second: The dimension if `first` is a name; another pair to explain a coupling.

        Raises:
            OptionError: The network has no such tensor or dimension.
        """
        if isinstance(first, str):
            return self._explainer.one((first, int(second)))
        if second is None:
            return self._explainer.one(tuple(first))
        return self._explainer.two(tuple(first), tuple(second))

    def trunk(self) -> CouplingGraph:
        """Return the same analysis with groups of which the members' own heads are no part."""
        if not self.program.heads:
            return self
        heads = self.program.heads

        def without_heads(group: CouplingGroup) -> CouplingGroup:
            kept = {place: rows for place, rows in group.index.items() if place[0] not in heads}
            return replace(group, index=kept)

        groups = tuple(without_heads(g) for g in self.groups)
        return replace(self, groups=groups, whole=self.whole or self)

    def freezing(self, names: Iterable[str], why: str) -> CouplingGraph:
        """Return the same analysis with some groups frozen: the base member keeps them."""
        chosen = set(names)
        frozen = dict(self.frozen)
        for group in self.groups:
            if group.name in chosen:
                for place, rows in group.index.items():
                    before = frozen[place].indices if place in frozen else np.empty(0, np.int64)
                    indices = np.union1d(before, rows.reshape(-1))
                    frozen[place] = FrozenReason(Kind.KEEP_BASE, why, "", "", indices)
        groups = tuple(g for g in self.groups if g.name not in chosen)
        return replace(
            self,
            groups=groups,
            frozen=frozen,
            free_fraction=_free_fraction(self.program, groups),
            members=tuple(member.freezing(names, why) for member in self.members),
        )


def analyze(
    model: nn.Module | ExportedProgram | Program,
    example: Any = (),
    constraints: Constraints | None = None,
) -> CouplingGraph:
    """Find the coupling groups of a network.

    Args:
        model: What `fxfuse.capture` takes, or its result.
        example: A tensor, a tuple, a mapping of keyword inputs, or an `Example`; batch of at least
            2.
        constraints: What must stay as it is.

    Returns:
        Groups, frozen dimensions and explanations.

    Raises:
        InputError: The model rejects the example inputs.
        CaptureError: The model cannot be captured.
        OptionError: A constraint names nothing in the network, or two contradict each other.
    """
    program = model if isinstance(model, Program) else capture(model, example)
    return couple(program, constraints or Constraints())


def couple(program: Program, constraints: Constraints) -> CouplingGraph:
    """Find the coupling groups of a captured network."""
    asked = asked_for(program, constraints)
    missing = program.unreached(excused(asked))
    if missing:
        warnings.warn(
            f"the example inputs do not reach {', '.join(missing)}: nothing is known of these, and "
            "they count as frozen. Pass an example that reaches them.",
            stacklevel=3,
        )
    found = _found(program, constraints, asked)
    collapsed = _collapsed(program, found)
    if collapsed:
        # Groups of channels that are all one unit: then the channels in them may be several.
        finer = _found(program, constraints, asked, collapsed)
        found = max(found, finer, key=lambda each: _free_fraction(program, each.groups))
    coupling, values, component, stuck, groups = found
    frozen = frozen_places(program, coupling, component, stuck, asked)
    notes = [
        *mixing_notes(coupling, component, stuck, values),
        *shared_writers(program, groups, frozen, coupling.readers, asked),
        *tied_outputs(program, groups, frozen, coupling.readers, coupling.writers),
    ]
    return CouplingGraph(
        program,
        groups,
        frozen,
        tuple(notes),
        _free_fraction(program, groups),
        frozenset(coupling.readers),
        frozenset(coupling.writers),
        values,
        coupling,
        constraints,
        asked,
        without_rule(coupling),
    )


class _Found(NamedTuple):
    """What a run of the rules found."""

    coupling: CouplingConstraints
    values: dict[fx.Node, Any]
    component: Index
    stuck: FrozenComponents
    groups: tuple[CouplingGroup, ...]


def _found(
    program: Program,
    constraints: Constraints,
    asked: Mapping[str, Asked],
    keeps_groups: frozenset[str] = frozenset(),
) -> _Found:
    coupling, values = interpret(program, interface_dims(program, constraints), keeps_groups)
    for name, wish in asked.items():
        coupling.ask(name, wish.kind, wish.why)
    component = coupling.components()
    stuck = frozen_components(program, coupling, component)
    groups = form_groups(program, coupling, component, stuck.mask)
    return _Found(coupling, values, component, stuck, groups)


def _collapsed(program: Program, found: _Found) -> frozenset[str]:
    """Return the operators with groups of several channels of which all are a single unit."""
    names = set()
    for node in program.graph.nodes:
        facts = FACTS.get(node.target)
        if not _has_groups(facts):
            continue
        groups = argument(node, facts.groups)
        if not isinstance(groups, int) or groups == 1:
            continue
        x, y = found.values[argument(node, facts.input)], found.values[node]
        if groups in (x.shape[1], y.shape[1]):
            continue
        units = [np.unique(found.component[f.held]) for f in y.fields]
        if any(len(u) == 1 and not found.stuck.mask[u].any() for u in units):
            names.add(node.name)
    return frozenset(names)


def _has_groups(facts: OperatorFacts | None) -> TypeGuard[Convolution | Normalisation]:
    if isinstance(facts, Normalisation):
        return facts.over == "group"
    return isinstance(facts, Convolution) and not facts.transposed


def hands_out(graph: CouplingGraph, constraints: Constraints) -> bool:
    """Whether units are in an output along a dimension that is no interface (`output_dims`)."""
    outputs, interface = graph.program.outputs(), interface_dims(graph.program, constraints)
    values = {index: graph.values.get(outputs[index]) for index in interface}
    return any(
        interface[index].isdisjoint(f.dims)
        for index, value in values.items()
        if isinstance(value, AbstractTensor)
        for f in value.fields
    )


def _free_fraction(program: Program, groups: Iterable[CouplingGroup]) -> float:
    several = (group for group in groups if group.n_units > 1)
    free = {program.canonical[name] for group in several for name, _ in group.index}
    total = inside = 0
    for name in program.reached():
        tensor = program.tensor(name)
        if isinstance(tensor, nn.Parameter):
            total += tensor.numel()
            inside += tensor.numel() if name in free else 0
    return inside / total if total else 0.0
