"""A fusion result and its members, as the steps after fusion take them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from fxfuse.activations.calibration import CalibrationBatches
from fxfuse.activations.statistics import warn_of_statistics
from fxfuse.analysis.coupling import CouplingGraph
from fxfuse.analysis.heads import joined_state
from fxfuse.common.options import check_type
from fxfuse.errors import MemberError, OptionError
from fxfuse.graph.capture import Program
from fxfuse.graph.module_checks import state_of
from fxfuse.planning.plan import FusionPlan

Member = nn.Module | ExportedProgram | Program


@runtime_checkable
class Fused(Protocol):
    """What `fxfuse.fuse` returns, as far as a step after it needs it."""

    @property
    def plan(self) -> FusionPlan:
        """Which unit of which member went where."""

    @property
    def graph(self) -> CouplingGraph:
        """The analysis of the members."""

    @property
    def module(self) -> fx.GraphModule:
        """The fused network."""


def states_of(result: Fused, members: Sequence[Member]) -> Sequence[Mapping[str, torch.Tensor]]:
    """The tensors of the members that were fused, by their names in the fused network.

    Of a block that a member lacks, parameters are zero, as they were in the fusion.
    """
    program = result.graph.program
    _check_count(result, members)
    own = [
        member.state() if isinstance(member, Program) else state_of(member) for member in members
    ]
    states = [joined_state(program, i, state) for i, state in enumerate(own)]
    states = [{**_absent(result, i), **state} for i, state in enumerate(states)]
    _check_members(result, states)
    return states


def _absent(result: Fused, member: int) -> dict[str, torch.Tensor]:
    """What stands for the tensors that a member lacks, by name."""
    program = result.graph.of_member(member).program
    names = [name for name, numbers in result.plan.absent.items() if member in numbers]
    found = {name: program.tensor(name) for name in names}
    return {
        name: torch.zeros_like(tensor) if isinstance(tensor, nn.Parameter) else tensor.clone()
        for name, tensor in found.items()
    }


def measurable(
    result: Fused, members: Sequence[Member], calibration: Any
) -> tuple[Sequence[Mapping[str, torch.Tensor]], CalibrationBatches]:
    """The members' tensors and the checked inputs, for a step that measures activations.

    Args:
        result: What `fxfuse.fuse` returned.
        members: The networks that were fused, in the same order.
        calibration: Inputs, or a `Calibration`.

    Raises:
        InputError: The inputs are not what the members take, or cannot be augmented.
        MemberError: These are not the members that were fused.
        CaptureError: The members were traced: there is no graph to run.
    """
    check_fused(result)
    result.graph.program.require_exported()
    batches = CalibrationBatches.of(result.graph.program, calibration)
    warn_of_statistics(result.graph.program, batches)
    return states_of(result, members), batches


def check_fused(result: Fused) -> None:
    """Check that this is what `fuse` or `prune` returned."""
    check_type("result", result, Fused, how="pass what fxfuse.fuse or fxfuse.prune returned")


def check_one_head(result: Fused, what: str, why: str) -> None:
    """Checks that a network is no partial fusion."""
    check_fused(result)
    if result.plan.heads:
        raise OptionError(
            f"a network with several heads cannot be {what}",
            why=why,
            how="train the heads with fxfuse.refine.finetune or distill",
        )


def check_joint(result: Fused, what: str) -> None:
    """Checks that the members do not run one by one in a network."""
    if result.plan.mixing.mode == "per_member":
        raise OptionError(
            f"there is nothing to {what}",
            why="the members run one by one in this network, so it is exactly their mean",
            how='fuse with a smaller width, or with mixing="joint"',
        )


def _check_count(result: Fused, members: Sequence[Member]) -> None:
    if len(members) != result.plan.n_members:
        raise MemberError(
            f"{result.plan.n_members} members were fused, got {len(members)}",
            how="pass the members of the fusion, in the same order",
        )


def _check_members(result: Fused, states: Sequence[Mapping[str, torch.Tensor]]) -> None:
    for number, state in enumerate(states):
        program = result.graph.of_member(number).program
        for name in program.names:
            tensor = program.tensor(name)
            if program.heads.get(name, number) != number:
                continue
            if name not in state or state[name].shape != tensor.shape:
                raise MemberError(
                    f"member {number} is not the network that was fused",
                    where=name,
                    why="it has no such tensor" if name not in state else "its shape differs",
                    how="pass the members of the fusion, in the same order",
                )
