"""Members as they are given → the network to fuse, and what each member has of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from fxfuse.analysis.head_search import find_heads
from fxfuse.analysis.heads import join
from fxfuse.analysis.label_spaces import Heads
from fxfuse.api.depth import as_deepest
from fxfuse.errors import OptionError
from fxfuse.graph.capture import Program, capture, capture_eagerly
from fxfuse.graph.export_reuse import captured_each
from fxfuse.graph.module_checks import check_finite, check_values
from fxfuse.graph.same_network import check_same_network
from fxfuse.members.on_ranks import members_on_ranks
from fxfuse.members.ranks import Ranks, of_each
from fxfuse.members.streamed import Network, first_member, split_paths, streamed_states
from fxfuse.planning.options import State

#: Positional and keyword inputs.
Example = tuple[Any, Mapping[str, Any] | None]


@dataclass(frozen=True)
class Gathered:
    """Members, wherever they are.

    Attributes:
        network: The network to fuse.
        states: For each member, its tensors of that network by name.
        aligned: For each member, its own capture of that network's graph; sizes may differ.
        given: The members as they were captured: before heads were joined, of any depth.
        absent: Tensors that some members lack → the numbers of these members.
        heads: The members' own heads; found ones are named.
        dim: The dimension of the outputs along which classes lie, where heads were looked for.
    """

    network: Program
    states: Sequence[State]
    aligned: list[Program]
    given: list[Program]
    absent: Mapping[str, tuple[int, ...]]
    heads: Heads
    dim: int = 0

    def check_weights(self) -> None:
        """Checks that all members have values, and finite ones.

        Raises:
            MemberError: A member is on the meta device.
            MemberError: A member holds NaN or infinity.
        """

        def check(number: int, state: State) -> None:
            check_values(state)
            check_finite(number, state)

        for _ in of_each(self.states, check):
            pass


def gathered(
    members: Sequence[Network | str | Path],
    example: Example,
    dynamic_shapes: Any,
    *,
    template: nn.Module | None,
    ranks: Ranks | None,
    heads: Heads,
    calibrated: bool,
) -> Gathered:
    """Captures members, in memory or in files, or spread over processes, and compares them.

    Args:
        members: As in `fxfuse.fuse`.
        example: Inputs that they accept.
        dynamic_shapes: Passed to `torch.export.export` unchanged.
        template: A module of the members' class, for members that are files.
        ranks: The processes over which members are spread.
        heads: The members' own heads, as they are asked for.
        calibrated: Whether members will run on calibration inputs.

    Raises:
        FxfuseError: What reading, capturing and comparing members raises; a `OptionError` where
            members are not in memory together, as what is asked for needs them.
    """
    if ranks is not None:
        _check_apart(bool(heads), "each is on its own rank", calibrated=calibrated)
        spread = members_on_ranks(ranks, members, template, example, dynamic_shapes)
        return _alike(*spread)
    files, networks = split_paths(members, template)
    if files:
        _check_apart(bool(heads), "files are only read", calibrated=calibrated)
        assert template is not None
        program = _captured([first_member(template, files[0])], example, dynamic_shapes)
        return _alike(program[0], streamed_states(files, program[0]))
    program = _captured(networks, example, dynamic_shapes)
    dim = 0
    if heads.modules is None or heads.output != "tuple":
        heads, dim = find_heads(program, heads)
    if heads:
        joined = join(program, heads, dim)
        aligned = [joined.program] * len(program)
        return Gathered(joined.program, joined.states, aligned, program, {}, heads, dim)
    deepest = as_deepest(program)
    if deepest is None:
        check_same_network(program, any_width=True)
        states = [member.state() for member in program]
        return Gathered(program[0], states, program, program, {}, heads)
    aligned = list(deepest.members)
    check_same_network(aligned, any_width=True)
    return Gathered(aligned[0], deepest.states, aligned, program, deepest.absent, heads)


def _alike(first: Program, states: Sequence[State]) -> Gathered:
    """Members that all have the first one's graph; only this one is captured."""
    each = [first] * len(states)
    return Gathered(first, states, each, each, {}, Heads(()))


def _captured(members: Sequence[Network], example: Example, dynamic_shapes: Any) -> list[Program]:
    inputs, kwargs = example

    def one(member: Network, first: Program | None) -> Program:
        if isinstance(member, Program):
            return member
        if first is not None and first.refusal and isinstance(member, nn.Module):
            # torch.export refuses the first one: it is not asked, and does not warn, again.
            return capture_eagerly(member, inputs, kwargs, refusal=first.refusal)
        return capture(member, inputs, kwargs, dynamic_shapes=dynamic_shapes)

    return captured_each(members, one)


def _check_apart(several: bool, why: str, *, calibrated: bool) -> None:
    """Checks that what is asked for works with members that are not in memory together."""
    if not (several or calibrated):
        return
    what = "heads=" if several else "calibration, refit or method 'auto'"
    raise OptionError(
        f"{what} needs members in memory",
        why=f"it runs the members, and {why}",
        how="load the checkpoints into modules, and pass these to one process",
    )
