"""Members of different depth: a residual block that a member lacks is the identity in it.

With all parameters of its branch zero, a residual block adds nothing to what it is given. So a
member that lacks a block is the deeper network with zeros there, and goes on as any other member:
at its own width, where that is another one. Whether that is so is not believed but run: the deeper
network has to answer as the member does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from fxfuse.analysis.constraints import Constraints
from fxfuse.analysis.coupling import CouplingGraph, CouplingGroup, couple
from fxfuse.errors import MemberError, RewriteError
from fxfuse.graph.capture import Program
from fxfuse.transform.resizing import program_at
from fxfuse.verify.check import relative_error, run, tolerance_of


@dataclass(frozen=True)
class Deepest:
    """Members as networks of the deepest one's graph.

    Attributes:
        members: For each member, that graph; with sizes of its own, where its width is another one.
        states: For each member, its tensors by the deepest one's names.
        absent: Tensors that some members lack, by name → the numbers of these members.
    """

    members: tuple[Program, ...]
    states: tuple[Mapping[str, torch.Tensor], ...]
    absent: Mapping[str, tuple[int, ...]]


def as_deepest(members: Sequence[Program]) -> Deepest | None:
    """Return the members in the graph of the deepest one, where some lack blocks that others have.

    None where all members have the same tensors, or where one of them was traced.
    """
    names = [set(member.names) for member in members]
    if all(n == names[0] for n in names) or not all(m.is_exported for m in members):
        return None
    number = max(range(len(members)), key=lambda i: len(names[i]))
    deepest = members[number]
    graph, found, states = None, list[Program](), list[Mapping[str, torch.Tensor]]()
    absent = dict[str, tuple[int, ...]]()
    for i, member in enumerate(members):
        missing = [name for name in deepest.names if name not in names[i]]
        for name in missing:
            absent[name] = (*absent.get(name, ()), i)
        own = {name: member.tensor(name) for name in member.names}
        extra = [name for name in own if name not in deepest.canonical]
        if extra:
            raise _mismatch(i, number, extra[0], f"member {number} has no such tensor")
        differs = any(own[name].shape != deepest.tensor(name).shape for name in own)
        if i == number or (differs and not missing):
            # One of another width only is compared with the others as such.
            found.append(member)
            states.append(member.state())
            continue
        graph = graph or couple(deepest, Constraints())
        deeper = _deeper(graph, own, i, number)
        # Also one that lacks nothing: tensors of the same names do not make the same network.
        _check_answers(member, deeper, missing, i, number)
        found.append(deeper if differs else deepest)
        states.append(deeper.state())
    return Deepest(tuple(found), tuple(states), absent)


def _deeper(
    graph: CouplingGraph, own: Mapping[str, torch.Tensor], number: int, other: int
) -> Program:
    """The deepest network with a member's tensors, and zeros for the parameters that it lacks."""
    try:
        found = {group.name: _own_size(graph, group, own) for group in graph.groups}
    except RewriteError as error:
        raise _mismatch(number, other, error.where, f"in its width, {error.why}") from error
    kept = {g.name: found[g.name] or g.n_units for g in graph.groups}
    alike = {_shape(g): size for g in graph.groups if (size := found[g.name]) is not None}
    # Heads of all blocks may have one size, b · heads: then they are as many in all blocks.
    twins = {g.name: found[g.name] or alike.get(_shape(g), g.n_units) for g in graph.groups}
    for sizes in (kept, twins):
        try:
            return program_at(graph, sizes, own)
        except RewriteError as error:
            refused = error
    raise _mismatch(number, other, refused.where, f"in its width, {refused.why}") from refused


def _own_size(
    graph: CouplingGraph, group: CouplingGroup, own: Mapping[str, torch.Tensor]
) -> int | None:
    """How many units of a group a member has; None where it lacks the block, or no tensor tells."""
    for (name, dim), rows in group.index.items():
        if name in own and len(graph.group_of[(name, dim)]) == 1:
            more, rest = divmod(
                own[name].shape[dim] - graph.program.tensor(name).shape[dim], rows.shape[1]
            )
            if rest:
                raise RewriteError(
                    "units differ in size",
                    where=f"{name}:{dim}",
                    why=f"{own[name].shape[dim]} is not a multiple of {rows.shape[1]}, the size of "
                    "a unit (head, group), which members of different depth must share",
                )
            return group.n_units + int(more)
    return None


def _shape(group: CouplingGroup) -> tuple[int, tuple[int, ...]]:
    """Return what groups of the same part of other blocks have in common."""
    return group.n_units, tuple(rows.shape[1] for rows in group.index.values())


def _check_answers(
    member: Program, deeper: Program, missing: Sequence[str], number: int, other: int
) -> None:
    """Check that the deeper network answers as the member does."""
    expected = run(member, member.state())
    error = relative_error(run(deeper, deeper.state()), expected)
    if error > tolerance_of(member, member.state(), expected):
        where = missing[0] if missing else ""
        without = f"without {where} and what belongs to it, " if missing else "with its tensors, "
        why = f"{without}member {other} returns other outputs (relative difference {error:.1e})"
        raise _mismatch(number, other, where, why)


def _mismatch(number: int, other: int, where: str, why: str) -> MemberError:
    return MemberError(
        f"member {number} is not member {other} with residual blocks left out",
        where=where,
        why=why,
        how="pass members of one architecture; depths may differ if missing blocks are residual "
        "and all others have the same names; a block whose sum is normalised (norm_first=False), "
        "and a network that counts its blocks, are not the identity at zero weights",
    )
