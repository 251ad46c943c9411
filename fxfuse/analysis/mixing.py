"""Where members put side by side are not the mean of the members any more."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from fxfuse.analysis.constraints import Asked
from fxfuse.analysis.coupling_constraints import CouplingConstraints
from fxfuse.analysis.freezing import FrozenComponents, FrozenReason
from fxfuse.analysis.grouping import CouplingGroup
from fxfuse.analysis.labels import AbstractTensor, Index, Kind, Place
from fxfuse.graph.capture import Program
from fxfuse.graph.source_lines import source_of


@dataclass(frozen=True)
class MixingNote:
    """An operator after which members put side by side are not the mean of the members.

    Attributes:
        why: What mixes.
        node: Name of the graph node.
        source: File, line and code of that node.
        sources: When not empty: it mixes only if members disagree on one of these parameters.
    """

    why: str
    node: str
    source: str
    sources: frozenset[str] = frozenset()


def mixing_notes(
    coupling: CouplingConstraints,
    component: Index,
    stuck: FrozenComponents,
    values: Mapping[fx.Node, Any],
) -> Iterable[MixingNote]:
    """Mixing operators; one that mixes certain neurons counts where an output averages them.

    An operator that meets nothing but neurons of one member's head mixes nobody.
    """
    heads = stuck.heads

    def is_of_heads(node: fx.Node) -> bool:
        operands = (values.get(n) for n in node.all_input_nodes)
        fields = [
            f for value in operands if isinstance(value, AbstractTensor) for f in value.fields
        ]
        ids = [component[f.held] for f in fields]
        return bool(fields) and all(bool(heads[each].all()) for each in ids)

    averaged = stuck.kind_is(Kind.OUTPUT)
    seen: set[tuple[str, str]] = set()
    for note in coupling.mixings:
        if note.ids is not None and not averaged[component[note.ids]].any():
            continue
        if note.node is not None and heads.any() and is_of_heads(note.node):
            continue
        node = note.node.name if note.node is not None else ""
        if (node, note.why) not in seen:
            seen.add((node, note.why))
            source = source_of(note.node) if note.node is not None else ""
            yield MixingNote(note.why, node, source, note.sources)


def shared_writers(
    program: Program,
    groups: Iterable[CouplingGroup],
    frozen: Mapping[Place, FrozenReason],
    readers: set[Place],
    asked: Mapping[str, Asked],
) -> Iterable[MixingNote]:
    """What the members' own units add to a shared dimension is averaged."""
    shared = {wish.why for wish in asked.values() if wish.kind is Kind.SHARED_INDEX}
    free = {place for group in groups for place in group.index}
    for name, dim in sorted(free):
        if (name, dim) not in readers:
            continue
        reasons = _reasons(program, frozen, name)
        why = next((r.why for r in reasons if r.why in shared), "")
        if why:
            node = next(n for n in program.graph.nodes if n.op == "get_attr" and n.target == name)
            user = next(iter(node.users))
            yield MixingNote(f"members are averaged in what is {why}", user.name, source_of(user))


def tied_outputs(
    program: Program,
    groups: Iterable[CouplingGroup],
    frozen: Mapping[Place, FrozenReason],
    readers: set[Place],
    writers: set[Place],
) -> Iterable[MixingNote]:
    """Weights that write neurons and make the output of them: one use has the 1/N of the other."""
    both = {place for group in groups for place in group.index} & readers & writers
    for name, _ in sorted(both):
        if not any(r.kind is Kind.OUTPUT for r in _reasons(program, frozen, name)):
            continue
        for node in program.graph.nodes:
            if node.op == "get_attr" and program.canonical.get(str(node.target)) == name:
                for user in node.users:
                    why = f"{name} both writes neurons and makes the output, the mean, of them"
                    yield MixingNote(why, user.name, source_of(user))


def _reasons(
    program: Program, frozen: Mapping[Place, FrozenReason], name: str
) -> list[FrozenReason]:
    """Return why dimensions of a tensor are frozen, of those that are."""
    places = ((name, dim) for dim in range(program.tensor(name).dim()))
    return [frozen[place] for place in places if place in frozen]
