"""Members, wherever they are, become the network to fuse and its tensors in each of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

from torch import nn

from fxfuse.analysis.constraints import Constraints
from fxfuse.analysis.head_search import find_heads
from fxfuse.analysis.heads import join
from fxfuse.analysis.label_spaces import Heads
from fxfuse.api.checks import check_count
from fxfuse.api.depth import as_deepest
from fxfuse.errors import MemberError, OptionError
from fxfuse.graph.capture import Program, capture, capture_eagerly
from fxfuse.graph.example import Example
from fxfuse.graph.export_reuse import captured_each
from fxfuse.graph.module_checks import (
    check_enough,
    check_finite,
    check_values,
    warn_of_twins,
)
from fxfuse.graph.same_network import check_same_interface, check_same_network
from fxfuse.members.members import Members
from fxfuse.members.on_ranks import members_on_ranks
from fxfuse.members.ranks import Ranks, of_each
from fxfuse.members.streamed import Network, first_member, split_paths, streamed_states
from fxfuse.planning.context import State


@dataclass(frozen=True)
class Ensemble:
    """Members, captured and compared.

    Attributes:
        states: For each member, its tensors of that network by name.
        aligned: For each member, its own capture of that network's graph; sizes may differ.
        given: The members as they were captured: before heads were joined, of any depth.
        absent: Tensors that some members lack → the numbers of these members.
        heads: The members' own heads; found ones are named.
        dim: The dimension of the outputs along which classes lie, where heads were looked for.
        others: Members of other architectures, by their numbers among all.
    """

    network: Program
    states: Sequence[State]
    aligned: list[Program]
    given: list[Program]
    absent: Mapping[str, tuple[int, ...]]
    heads: Heads
    dim: int = 0
    others: Mapping[int, Program] = field(default_factory=dict)

    @property
    def numbers(self) -> list[int]:
        """The number among all members of each that is fused."""
        every = range(len(self.states) + len(self.others))
        return [number for number in every if number not in self.others]

    @property
    def architectures(self) -> dict[int, Program]:
        """The fused network, and each member of another architecture, by a member's number."""
        return {self.numbers[0]: self.network, **self.others}

    def check_weights(self) -> None:
        """Check that all members have values, and finite ones."""

        def check(number: int, state: State) -> None:
            check_values(state)
            check_finite(number, state)

        for _ in of_each(self.states, check):
            pass
        for number, program in self.others.items():
            check(number, program.state())


def single(program: Program) -> Ensemble:
    """Return the ensemble of one network."""
    found = Ensemble(program, [program.state()], [program], [program], {}, Heads(()))
    found.check_weights()
    return found


def load_members(
    members: Members,
    example: Example,
    heads: Heads,
    *,
    runs_members: bool,
    count: int | None = None,
    base_member: int | None = None,
) -> Ensemble:
    """Capture members, in memory or in files, or spread over processes, and compare them.

    `runs_members` says whether they will run on calibration inputs. `count` is how many there must
    be; None: two or more. Members may be of other architectures than `base_member`, where there is
    one and members run.
    """
    ranks = None if members.group is None else Ranks(members.group)
    networks = members.networks
    n = len(networks) if ranks is None else sum(ranks.all(lambda: len(networks)))
    if count is None:
        check_enough(range(n), "fusion")
    else:
        check_count(count, n)
    found = _loaded(members, example, heads, ranks, base_member, runs_members=runs_members)
    found.check_weights()
    warn_of_twins(networks)
    return found


def _loaded(
    members: Members,
    example: Example,
    heads: Heads,
    ranks: Ranks | None,
    base_member: int | None,
    *,
    runs_members: bool,
) -> Ensemble:
    networks, template = members.networks, members.template
    if ranks is not None:
        _check_apart(bool(heads), "each is on its own rank", runs_members=runs_members)
        spread = members_on_ranks(ranks, members, example)
        return _alike(*spread)
    files, modules = split_paths(networks, template)
    if files:
        _check_apart(bool(heads), "files are only read", runs_members=runs_members)
        assert template is not None
        weights = members.checkpoints.weights
        program = _captured([first_member(template, files[0], weights)], example)
        return _alike(program[0], streamed_states(files, program[0], weights))
    program = _captured(modules, example)
    dim = 0
    if heads.modules is None or heads.output != "tuple":
        heads, dim = find_heads(program, heads)
    if heads:
        joined = join(program, heads, dim)
        aligned = [joined.program] * len(program)
        return Ensemble(joined.program, joined.states, aligned, program, {}, heads, dim)
    try:
        return _one_architecture(program)
    except MemberError as error:
        if base_member is None:
            raise
        return _architectures(program, base_member, error, runs_members=runs_members)


def _one_architecture(program: list[Program]) -> Ensemble:
    """Members of one graph; widths and depths may differ."""
    heads, deepest = Heads(()), as_deepest(program)
    if deepest is None:
        check_same_network(program, any_width=True)
        states = [member.state() for member in program]
        # Traces of one network differ in numbers that the example gave, and in nothing else.
        exported = program[0].is_exported
        aligned = program if exported else [program[0]] * len(program)
        return Ensemble(program[0], states, aligned, program, {}, heads)
    aligned = list(deepest.members)
    check_same_network(aligned, any_width=True)
    return Ensemble(aligned[0], deepest.states, aligned, program, deepest.absent, heads)


def _architectures(
    program: list[Program], base: int, error: MemberError, *, runs_members: bool
) -> Ensemble:
    """Those members that have the base member's architecture, and beside them all others.

    `error` says why they are not of one architecture.
    """
    if not runs_members:
        raise MemberError(
            error.what,
            where=error.where,
            why=error.why,
            how=f"{error.how}; members of different architectures are fused with calibration= "
            "inputs, on which they are compared and matched, and fxfuse.stack runs them side by "
            "side",
        )
    Constraints(base_member=base).check_base_member(len(program))
    check_same_interface(program)
    found, kept = _one_architecture([program[base]]), [base]
    for number in range(len(program)):
        if number == base:
            continue
        tried = sorted([*kept, number])
        with suppress(MemberError):
            found, kept = _one_architecture([program[i] for i in tried]), tried
    others = {i: each for i, each in enumerate(program) if i not in kept}
    for each in others.values():
        each.require_exported()
    return replace(found, others=others)


def _alike(first: Program, states: Sequence[State]) -> Ensemble:
    """Members that all have the first one's graph; only this one is captured."""
    each = [first] * len(states)
    return Ensemble(first, states, each, each, {}, Heads(()))


def _captured(members: Sequence[Network], example: Example) -> list[Program]:
    def one(member: Network, first: Program | None) -> Program:
        if isinstance(member, Program):
            return member
        if first is not None and first.refusal and isinstance(member, nn.Module):
            # torch.export rejects the first one: it is not asked, and does not warn, again.
            return capture_eagerly(member, example, refusal=first.refusal)
        return capture(member, example)

    return captured_each(members, one)


def _check_apart(several: bool, why: str, *, runs_members: bool) -> None:
    """Check that what is asked for works with members that are not in memory together."""
    if not (several or runs_members):
        return
    what = "heads=" if several else "calibration="
    raise OptionError(
        f"{what} needs members in memory",
        why=f"it runs the members, and {why}",
        how="load the checkpoints, as Members.from_files(...).load() does, in one process",
    )
