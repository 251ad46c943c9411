"""Stacking: members → capture → walk → order → emit → verify."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from fxfuse.ensemble.forms import Writer
from fxfuse.ensemble.members import INVENTORY
from fxfuse.ensemble.order import in_depth
from fxfuse.ensemble.policy import policy_of
from fxfuse.ensemble.reduce import REDUCTIONS, write_output
from fxfuse.ensemble.reuse import reuse_memory
from fxfuse.ensemble.side_by_side import side_by_side
from fxfuse.ensemble.walk import changes_tensors, walk, written_tensors
from fxfuse.ensemble.weights import Inventory, Place, as_words
from fxfuse.errors import MemberError, OptionError, VerificationError
from fxfuse.graph.capture import Program, capture
from fxfuse.graph.eager import alone
from fxfuse.graph.example import Example, is_single
from fxfuse.graph.export_reuse import captured_each
from fxfuse.graph.module_checks import check_enough, check_values, warn_of_twins
from fxfuse.graph.same_network import check_same_interface, check_same_network
from fxfuse.graph.tensors import tensors_in
from fxfuse.members.members import Members
from fxfuse.transform.emit import FusedModule, copy_graph, emit, emit_graph
from fxfuse.verify.check import (
    in_best_precision,
    in_double,
    inputs_of,
    precision_in_words,
    relative_error,
    rounding_of,
)
from fxfuse.verify.in_double import hasten

#: Relative to the largest output, in float64: the members do not meet, so nothing but rounding.
_EXACT = 1e-12
#: Share of the weights that are stacked, below which members may answer bit for bit as they do.
_FEW_STACKED = 0.1
#: So many roundings of the outputs explain a difference, where they are in a lower precision.
_ROUNDINGS = 1e3


def stack(
    members: Sequence[nn.Module | ExportedProgram | Program],
    example: Any = (),
    *,
    reduce: str = "mean",
    class_dim: int = -1,
    verify: bool = True,
) -> FusedModule:
    """Write an ensemble as one graph that computes all members, losslessly.

    Members never mix, so the outputs are exactly theirs. Of members of one graph, what is the same
    for all is computed once, linear layers of all members are one product, and everything else runs
    member by member. Members of different architectures run side by side on the same inputs.

    Args:
        members: Two or more networks that take the same inputs and return outputs of the same
            shapes; they are copied.
        example: A tensor, a tuple, a mapping of keyword inputs, or an `Example`. The stack takes
            any batch, but it is optimised for this one: use the size that it will run on. A single
            input is repeated if members answer both as they answer one.
        reduce: What becomes of every output tensor, of shape `[*]` in a member. `mean`: the mean,
            `[*]`. `probabilities`: of logits along `class_dim` the mean of their softmax, so
            probabilities `[*]`, which sum to one there. `none`: `[N, *]`, member i at index i.
            `vote`: of the classes along `class_dim` the one that most members find largest, int64
            without that dimension; of several such classes the one with the largest mean output. A
            member that finds two classes equally large votes for both. Structures, boxes and class
            numbers have no meaningful mean: use `none`, and combine them yourself.
        class_dim: Dimension of the classes in a member's output, for `vote` and `probabilities`.
        verify: Whether to compare what each member answers with that member, in float64, on the
            example.

    Returns:
        A module in eval mode, called as a member is. It follows `train()` and `eval()`, trains
        every member, and can be pickled, moved, compiled with `fullgraph=True` and exported. Its
        tensors are `member<i>__<name>`, or `stacked__<name>` for all members in one (`[N, *shape]`
        or a view of it), or `shared__<name>` where members hold the same tensor object, with `__`
        for dots; `fxfuse.unstack` gives the members' state dicts. Inputs are never written into.

    Raises:
        InputError: A member rejects the example inputs.
        MemberError: The members are fewer than two, take other inputs, return other outputs, or
            hold unusable weights.
        CaptureError: `torch.export` rejects a member.
        RewriteError: An output cannot be reduced in that way.
        VerificationError: An output differs from the members'.
    """
    check_enough(members := list(Members.of(members).networks), "a stack")  # type: ignore[arg-type]
    warn_of_twins(members)
    if reduce not in REDUCTIONS:
        raise OptionError(f"unknown reduce {reduce!r}", how=f"use one of {', '.join(REDUCTIONS)}")
    given = Example.of(example)
    program = captured_each(members, lambda m, _: _captured(m, given))
    for member in program:
        check_values(member.state())
    policy = policy_of(_device(program[0]))
    if _are_one_network(program):
        single = is_single(*_example(members[0], given))
        writer = walk(program, policy, single=single)
        joined, inventory = writer.weights.place_tensors()
    else:
        check_same_interface(program)
        writer, joined, inventory = side_by_side(program, policy)
    module = _emitted(writer, joined, "none", class_dim)
    if verify:
        _check(module, program, alike=_runs_one_by_one(inventory))
    if reduce != "none":
        module = _emitted(writer, joined, reduce, class_dim)
    module.meta[INVENTORY] = inventory
    return module


def _are_one_network(members: Sequence[Program]) -> bool:
    try:
        check_same_network(members)
    except MemberError:
        return False
    return True


def _captured(member: nn.Module | ExportedProgram | Program, example: Example) -> Program:
    if isinstance(member, Program):
        member.require_exported()
        return member
    return capture(member, example, fallback=False)


def _example(
    member: nn.Module | ExportedProgram | Program, example: Example
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the example as it was given: capture may have made two of it."""
    if isinstance(member, Program):
        return member.example_inputs
    return example.args, dict(example.kwargs)


def _device(program: Program) -> torch.device:
    tensors = [*program.state().values(), *tensors_in(program.example_inputs)]
    return tensors[0].device if tensors else torch.device("cpu")


def _emitted(writer: Writer, joined: Program, reduce: str, class_dim: int) -> FusedModule:
    """A module with the tensors of `joined` themselves, so that two of them cost what one does."""
    output = write_output(writer, reduce, class_dim)
    keeps_order = any(changes_tensors(member.graph) for member in writer.members)
    graph = copy_graph(writer.graph) if keeps_order else in_depth(writer.graph)
    writer.graph.erase_node(output)
    written = written_tensors(graph)
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.view.default):
        # Tensors of a stack need not be as contiguous as a member's own.
        if node not in written:
            node.target = torch.ops.aten.reshape.default
    reuse_memory(graph)
    graph.lint()
    constants: dict[str, torch.Tensor] = {}
    reads = [n for n in graph.nodes if n.op == "get_attr" and n.target not in joined.canonical]
    words = as_words(dict.fromkeys(str(node.target) for node in reads))
    for node in reads:
        own = str(node.target)
        node.target = f"constant{words[own]}"
        known = writer.constants.get(own)
        constants[node.target] = writer.members[0].tensor(own) if known is None else known
    return emit_graph(joined, joined.state(), graph, constants)


def _runs_one_by_one(inventory: Inventory) -> bool:
    """Tell whether nearly all weights of a stack are read by operators of one member."""
    sizes = dict.fromkeys(Place, 0)
    for entry in (entry for own in inventory.entries for entry in own):
        sizes[entry.place] += math.prod(entry.shape)
    return sizes[Place.STACKED] < _FEW_STACKED * sum(sizes.values())


@alone
def _check(module: FusedModule, members: Sequence[Program], *, alike: bool) -> None:
    """Compare all outputs of all members with theirs, in float64.

    Where the operators are likely `alike`, so may be the outputs, bit for bit, in the members' own
    precision; that is asked first, since it costs less.
    """

    def outputs(*, double: bool) -> list[torch.Tensor]:
        """Return those of the stack, and behind them those of the members."""
        # Networks that draw random numbers draw the same ones, member after member.
        with torch.random.fork_rng():
            torch.manual_seed(0)
            own = (emit(member, _copied(member.state())) for member in members)
            expected = [_answers(n, m, double=double) for n, m in zip(own, members, strict=True)]
            torch.manual_seed(0)
            found = _answers(copy.deepcopy(module), members[0], double=double)
        return [*found, *(torch.stack(each) for each in zip(*expected, strict=True))]

    if alike:
        both = outputs(double=False)
        if all(map(torch.equal, both[: len(both) // 2], both[len(both) // 2 :])):
            return
    both = in_best_precision(lambda: outputs(double=True), lambda: outputs(double=False))
    found, expected = both[: len(both) // 2], both[len(both) // 2 :]
    error = relative_error(found, expected)
    tolerance = max(_EXACT, _ROUNDINGS * rounding_of(both))
    if error > tolerance:
        raise VerificationError(
            "the stack does not answer like its members",
            why=f"the relative error {precision_in_words(both) or 'in float64 '}is {error:.2e}, "
            f"rounding explains {tolerance:.0e}",
            how="check that the members' outputs are finite and the same in every call, or report "
            "the network; verify=False skips this check",
        )


def _copied(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies, since a network may write into its own tensors."""
    return {name: tensor.clone() for name, tensor in state.items()}


def _answers(module: FusedModule, member: Program, *, double: bool) -> list[torch.Tensor]:
    args, kwargs = inputs_of(member, double=double)
    if double:
        hasten(in_double(module))
    with torch.no_grad():
        return tensors_in(module(*args, **kwargs))
