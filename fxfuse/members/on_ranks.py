"""Members that are given to several processes: member 0 on every rank, others where they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxfuse.errors import CheckpointError, MemberError, OptionError
from fxfuse.graph.capture import Program, capture
from fxfuse.graph.example import Example
from fxfuse.graph.export_reuse import reuse_export
from fxfuse.graph.module_checks import check_model
from fxfuse.graph.same_network import check_same_as
from fxfuse.graph.tensors import named_tensors
from fxfuse.members.fingerprint import fingerprint
from fxfuse.members.members import Members
from fxfuse.members.ranks import RankedStates, Ranks, State
from fxfuse.members.streamed import first_member, streamed_state, with_tensors


def members_on_ranks(
    ranks: Ranks, given: Members, example: Example
) -> tuple[Program, RankedStates]:
    """Return member 0, captured on every rank, and the tensors of all members.

    Each process calls with its own members, modules or paths of checkpoints, of which there may be
    none; then it has a template. The example inputs of the rank that has member 0 count. What one
    rank raises is raised on all.
    """
    members, template, weights = given.networks, given.template, given.checkpoints.weights
    owners = [r for r, n in enumerate(ranks.all(lambda: len(members))) for _ in range(n)]
    numbers = [number for number, owner in enumerate(owners) if owner == ranks.rank]
    made: list[Any] = []

    def own_network() -> None:
        _check_members(members, template)
        if template is None:
            made.append(members[0])
        elif numbers[:1] == [0]:
            path = members[0]
            assert isinstance(path, str | Path)
            made.append(first_member(template, path, weights))
        else:
            made.append(template)
        check_model(made[0])

    ranks.all(own_network)
    device = next(
        (t.device for _, t in named_tensors(made[0]) if not t.is_meta), torch.device("cpu")
    )

    tensors = ranks.from_rank(owners[0], lambda: dict(made[0].state_dict()), device)
    # Examples that are drawn at random differ from rank to rank.
    args, kwargs = ranks.from_rank(owners[0], lambda: (example.args, example.kwargs), device)
    example = Example(args, kwargs, example.dynamic_shapes)

    def program() -> dict[str, str]:
        if ranks.rank != owners[0]:
            made[0] = _stand_in(made[0], tensors)
        made.append(capture(made[0], example))
        return _told(made[1])

    _check_alike(ranks.all(program), owners[0])
    first: Program = made[1]
    own: dict[int, State] = {}

    def read() -> None:
        for number, member in zip(numbers, members, strict=True):
            own[number] = (
                first.state()
                if number == 0
                else _state(member, number, first, example.dynamic_shapes, weights)
            )

    ranks.all(read)
    return first, RankedStates(ranks, owners, first.state(), own, device)


def _stand_in(template: nn.Module, tensors: dict[str, torch.Tensor]) -> nn.Module:
    """Return member 0, as a copy of a module of this rank."""
    try:
        return with_tensors(template, tensors, "member 0")
    except CheckpointError as error:
        raise MemberError(
            "the network of this rank is not the network of member 0",
            why=error.why,
            how="build the modules and templates of all ranks with the same arguments",
        ) from error


def _check_members(members: Sequence[Any], template: nn.Module | None) -> None:
    kinds = {isinstance(member, str | Path) for member in members}
    wrong = next((m for m in members if not isinstance(m, nn.Module | str | Path)), None)
    if wrong is not None:
        raise OptionError(
            f"a {type(wrong).__name__} cannot be a member with group=",
            why="every rank runs member 0 as a copy of its own module",
            how="pass modules, or paths of checkpoints with template=",
        )
    if template is None and kinds != {False}:
        raise OptionError(
            "this rank has no module of the members' class",
            why="every rank runs member 0, and files hold tensors only"
            if kinds
            else "every rank runs member 0, even one without members",
            how="pass template=, a module of the members' class; it may be on the meta device",
        )
    if template is not None and False in kinds:
        raise OptionError(
            "template= is for members in files, and for a rank without members",
            how="leave template= out, or pass paths",
        )


def _state(
    member: Any, number: int, first: Program, dynamic_shapes: Any, weights: str | None
) -> State:
    if not isinstance(member, nn.Module):
        return streamed_state(member, number, first, weights)
    check_model(member)
    args, kwargs = first.example_inputs
    other = reuse_export(first, member) or capture(member, Example(args, kwargs, dynamic_shapes))
    check_same_as(first, other, number)
    return other.state()


def _told(program: Program) -> dict[str, str]:
    """Return what must be the same of member 0 on all ranks: operators, tensors, constants."""
    nodes = {f"node {i}": f"{n.op} {n.target}" for i, n in enumerate(program.graph.nodes)}
    return {**nodes, **fingerprint(dict(named_tensors(program.module)))}


def _check_alike(told: Sequence[Mapping[str, str]], first: int) -> None:
    for rank, theirs in enumerate(told):
        names = [*told[first], *theirs]
        differing = next((n for n in names if told[first].get(n) != theirs.get(n)), None)
        if differing is not None:
            raise MemberError(
                f"rank {rank} has another network than rank {first}",
                where=differing,
                why="with the weights of member 0, operators or constants differ",
                how="build the modules and templates of all ranks with the same arguments",
            )
