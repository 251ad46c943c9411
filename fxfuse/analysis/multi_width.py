"""Members of different widths: one graph, other sizes, an analysis for each of them.

Where only the number of units differs, each member's units go on as those of members of one width.
Where the units themselves have another size (heads of 4 and of 6 channels, groups of a GroupNorm),
no unit of one member can take the place of another's: such a group is frozen. The first member
keeps it, and where members run one by one each keeps its own. A number that the graph calculates
with and that follows from a width (a scale) mixes members, since the fused network has one of it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import fx

from fxfuse.analysis.coupling import CouplingGraph, CouplingGroup, MixingNote
from fxfuse.analysis.labels import AbstractTensor, Kind, Place, neurons
from fxfuse.errors import MemberError, OptionError
from fxfuse.graph.capture import Program
from fxfuse.graph.source_lines import source_of, where_of
from fxfuse.graph.torch_compat import pytree


def multi_width(
    graph: CouplingGraph,
    members: Sequence[Program],
    analyze: Callable[[Program], CouplingGraph],
) -> CouplingGraph:
    """Return the analysis of the first member, with those of the others where their sizes differ.

    Groups whose units differ in size are frozen in all of them.

    Returns:
        `graph` itself where all members have one size.
    """
    keys = [_key(member) for member in members]
    known = {keys[0]: graph}
    irregular: dict[str, str] = {}
    for number, (key, member) in enumerate(zip(keys, members, strict=True)):
        if key not in known:
            known[key] = analyze(member)
            irregular |= _irregular(graph, known[key], number)
    if len(known) == 1:
        return graph
    shared = set[Place]().union(*(_shared(graph, g) for g in known.values()))
    notes: dict[str, MixingNote] = {}
    for number, key in enumerate(keys):
        _check_alike(graph, known[key], number, irregular, shared)
        apart = _numbers_apart(graph, known[key], number, irregular)
        notes = {note.node: note for note in apart} | notes
    for name, why in irregular.items():
        known = {key: found.freezing([name], why) for key, found in known.items()}
    known = {key: _hosted(found, shared) for key, found in known.items()}
    mixing = (*known[keys[0]].mixing, *notes.values())
    return replace(known[keys[0]], mixing=mixing, members=tuple(known[key] for key in keys))


def check_base_member(graph: CouplingGraph, n_members: int) -> None:
    """Check that the base member can keep what is frozen inside the network, at its size there."""
    graph.constraints.check_base_member(n_members)
    base_member = graph.constraints.base_member
    own = graph.of_member(base_member)
    for (name, dim), reason in graph.frozen.items():
        found = own.frozen[(name, dim)].indices
        if reason.kind is Kind.KEEP_BASE and len(found) != len(reason.indices):
            raise OptionError(
                f"member {base_member} cannot be the base member",
                where=f"{name}:{dim}",
                why=f"it has {len(found)} frozen indices there, but member 0, whose graph is used, "
                f"has {len(reason.indices)}: {reason.why}",
                how="pass that member first, and leave base_member= out",
            )


def _key(member: Program) -> tuple[Any, ...]:
    """Return what members with one graph may differ in: shapes, and numbers in the graph."""
    shapes = tuple(tuple(member.tensor(name).shape) for name in member.names)
    return shapes, tuple(_numbers(node) for node in member.graph.nodes)


def _numbers(node: fx.Node) -> tuple[int | float, ...]:
    leaves = pytree.tree_leaves((node.args, node.kwargs))
    return tuple(leaf for leaf in leaves if isinstance(leaf, int | float))


def _irregular(first: CouplingGraph, other: CouplingGraph, number: int) -> dict[str, str]:
    """Return the groups whose units are others in a member, by name → why they are frozen."""
    ours, theirs = ({group.name: group for group in g.groups} for g in (first, other))
    found = {}
    for name in {**ours, **theirs}:
        slots = [_slots(groups.get(name)) for groups in (ours, theirs)]
        for where in {**slots[0], **slots[1]}:
            a, b = (of.get(where, 0) for of in slots)
            if a != b:
                place = f"{where[0]}:{where[1]}"
                found[name] = (
                    f"a unit has {a} indices of {place} in member 0, {b} in member {number}"
                )
                break
    return found


def _slots(group: CouplingGroup | None) -> dict[Place, int]:
    """Return how many indices a unit owns in each place."""
    return {} if group is None else {p: rows.shape[1] for p, rows in group.index.items()}


def _shared(first: CouplingGraph, other: CouplingGraph) -> set[Place]:
    """Places of another size in a member that all units share: a norm over each head's channels."""
    found = set[Place]()
    for place, reason in first.frozen.items():
        sizes = [g.program.tensor(place[0]).shape[place[1]] for g in (first, other)]
        if sizes[0] != sizes[1] and reason.inside and place not in first.group_of:
            found.add(place)
    return found


def _hosted(graph: CouplingGraph, places: Collection[Place]) -> CouplingGraph:
    """Return the same analysis with places frozen to the base member: there is no mean of them."""
    frozen = {
        place: replace(reason, kind=Kind.KEEP_BASE) if place in places else reason
        for place, reason in graph.frozen.items()
    }
    return replace(graph, frozen=frozen)


def _check_alike(
    first: CouplingGraph,
    other: CouplingGraph,
    number: int,
    irregular: Collection[str],
    shared: Collection[Place],
) -> None:
    frozen_now = {
        place
        for g in (first, other)
        for group in g.groups
        if group.name in irregular
        for place in group.index
    }
    for name in first.program.names:
        ours, sizes = (g.program.tensor(name).shape for g in (first, other))
        for dim, (a, b) in enumerate(zip(ours, sizes, strict=True)):
            place = (name, dim)
            frozen = [
                0 if g.frozen.get(place) is None else len(g.frozen[place].indices)
                for g in (first, other)
            ]
            if a == b or place in shared or place in frozen_now:
                continue
            if place in first.group_of and frozen[0] == frozen[1]:
                continue
            reason = first.frozen.get(place)
            why = f"{a} and {b} indices, and they are frozen"
            raise _mismatch(number, f"{name}:{dim}", f"{why}: {reason.why}" if reason else why)


def _numbers_apart(
    first: CouplingGraph, other: CouplingGraph, number: int, irregular: Collection[str]
) -> list[MixingNote]:
    """Return where a member calculates with other numbers, on units that are not of another size.

    A scale that follows from a width, say. Each member needs its own.
    """
    shapes = [
        [tuple(g.program.tensor(name).shape) for name in first.program.names]
        for g in (first, other)
    ]
    component = first.coupling.components()
    inside = np.zeros(int(component.max(initial=-1)) + 1, dtype=bool)
    for owner, place in enumerate(first.coupling.owners):
        for group in first.group_of.get(place, ()):
            if group.name in irregular:
                inside[component[first.coupling.starts[owner] + group.index[place]]] = True
    found = []
    nodes = zip(first.program.graph.nodes, other.program.graph.nodes, strict=True)
    for ours, theirs in nodes:
        # Of members that differ in shape, sizes in the graph differ as well.
        a, b = (
            [x for x in _numbers(node) if shapes[0] == shapes[1] or isinstance(x, float)]
            for node in (ours, theirs)
        )
        if a == b:
            continue
        values = pytree.tree_leaves(
            first.values.get(ours), is_leaf=lambda x: isinstance(x, AbstractTensor)
        )
        fields = [f for value in values if isinstance(value, AbstractTensor) for f in value.fields]
        if any(inside[component[neurons(f.bare).reshape(-1).numpy()]].any() for f in fields):
            continue
        if shapes[0] == shapes[1]:
            why = f"{ours.format_node()} vs {theirs.format_node()}"
            raise _mismatch(number, where_of(ours), why)
        why = f"members calculate with other numbers: {a} in member 0, {b} in member {number}"
        found.append(MixingNote(why, ours.name, source_of(ours)))
    return found


def _mismatch(number: int, where: str, why: str) -> MemberError:
    return MemberError(
        f"member {number} differs from member 0 in more than its number of units",
        where=where,
        why=why,
        how="pass members of one architecture that differ only in the number or size of channels, "
        "neurons, heads or groups; if tasks or classes differ, name the heads to keep with heads=",
    )
