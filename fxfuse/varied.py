"""Members of different widths: one graph, other sizes, an analysis for each of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from fxfuse.capture import Captured
from fxfuse.coupling import CouplingGraph, CouplingGroup
from fxfuse.errors import MemberMismatchError


def of_all_widths(
    graph: CouplingGraph,
    members: Sequence[Captured],
    analyze: Callable[[Captured], CouplingGraph],
) -> CouplingGraph:
    """The analysis of the first member, with those of the others where their sizes differ.

    Args:
        graph: The analysis of the first member.
        members: Captured members with one graph, apart from sizes.
        analyze: Analyzes a member with the same options.

    Returns:
        `graph` itself where all members have one size.

    Raises:
        MemberMismatchError: The members differ in something else than the number of units.
    """
    known = {_shapes(members[0]): graph}
    analyses = []
    for number, member in enumerate(members):
        shapes = _shapes(member)
        if shapes not in known:
            known[shapes] = analyze(member)
            _check_alike(graph, known[shapes], number)
        analyses.append(known[shapes])
    return graph if len(known) == 1 else replace(graph, members=tuple(analyses))


def _shapes(member: Captured) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(member.tensor(name).shape) for name in member.names)


def _check_alike(first: CouplingGraph, other: CouplingGraph, number: int) -> None:
    theirs = {group.name: group for group in other.groups}
    for group in first.groups:
        if group.name not in theirs:
            raise _mismatch(number, group.name, "only member 0 has this coupling group")
        _check_group(group, theirs.pop(group.name), number)
    for name in theirs:
        raise _mismatch(number, name, f"only member {number} has this coupling group")
    for name in first.captured.names:
        ours, sizes = (g.captured.tensor(name).shape for g in (first, other))
        for dim, (a, b) in enumerate(zip(ours, sizes, strict=True)):
            place = (name, dim)
            frozen = [
                0 if g.frozen.get(place) is None else len(g.frozen[place].indices)
                for g in (first, other)
            ]
            if (place in first.group_of and frozen[0] == frozen[1]) or a == b:
                continue
            reason = first.frozen.get(place)
            why = f"{a} and {b} indices, and they are frozen"
            raise _mismatch(number, f"{name}:{dim}", f"{why}: {reason.why}" if reason else why)


def _check_group(ours: CouplingGroup, theirs: CouplingGroup, number: int) -> None:
    for place, rows in ours.index.items():
        found = theirs.index.get(place)
        if found is None or found.shape[1] != rows.shape[1]:
            had = 0 if found is None else found.shape[1]
            why = f"a unit has {rows.shape[1]} indices there in member 0, and {had} in it"
            raise _mismatch(number, f"{place[0]}:{place[1]}", why)


def _mismatch(number: int, where: str, why: str) -> MemberMismatchError:
    return MemberMismatchError(
        f"member {number} differs from member 0 in more than its number of units",
        where=where,
        why=why,
        how="give members of one architecture whose layers differ in their number of channels, "
        "neurons or heads only; where tasks or classes differ, name the heads to keep: heads=...",
    )
