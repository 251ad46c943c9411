"""What stands between members and the network that is handed over: is it sound, and is it right."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from math import isfinite

from fxfuse.analysis.coupling import CouplingGraph
from fxfuse.analysis.freezing import excused
from fxfuse.errors import PlanError, VerificationError
from fxfuse.graph.capture import check_reached
from fxfuse.verify import Check, Verification, permutation_of, wrong_groups


def examined(graph: CouplingGraph, *, verify: bool) -> tuple[CouplingGraph, list[Check]]:
    """What of a network can be fused or pruned, and what the oracles say of it.

    Args:
        graph: The analysis of the network.
        verify: Whether to run the permutation oracle; groups that it cannot move are frozen.

    Raises:
        CaptureError: The network was traced, and the example does not reach all of its
            weights.
        PlanError: No parameter has a free dimension.
    """
    check_reached(graph.program, excused(graph.asked))
    checks = []
    if verify:
        graph, check = _only_what_moves(graph)
        checks.append(check)
    _check_free(graph)
    return graph, checks


def _check_free(graph: CouplingGraph) -> None:
    if graph.groups:
        return
    if not list(graph.program.module.parameters()):
        raise PlanError(
            "nothing in this network can be fused",
            why="it has no parameters",
            how="pass networks with trained weights",
        )
    reasons = [r for r in graph.frozen.values() if r.node]
    reasons.sort(key=lambda reason: reason.interface)
    raise PlanError(
        "nothing in this network can be fused",
        where=f"{reasons[0].node}  {reasons[0].source}".rstrip() if reasons else "",
        why="every dimension of every parameter is frozen"
        + (f"; the first: {reasons[0].why}" if reasons else ""),
        how="see fxfuse.analyze(...).frozen for all reasons; "
        + (
            "use freeze, share and ignore for fewer tensors"
            if graph.asked
            else "write a rule for an operator that has none"
        ),
    )


def _only_what_moves(graph: CouplingGraph) -> tuple[CouplingGraph, Check]:
    """Freezes the groups that the permutation oracle cannot move, with a loud warning."""
    check = permutation_of(graph)
    wrong = () if check.passed or not isfinite(check.error) else wrong_groups(graph)
    if not wrong:
        return graph, check
    names = [g.name for g in wrong]
    warnings.warn(
        f"coupling groups {names} changed the network when permuted, so they are frozen and one "
        "member's weights are kept there. A rule of fxfuse is wrong: please report the network.",
        stacklevel=4,
    )
    graph = graph.freezing(names, "the permutation oracle could not move this group")
    return graph, permutation_of(graph)


def verified(checks: Sequence[Check]) -> Verification:
    """What the oracles found, once it is sure that every one of them held.

    Raises:
        VerificationError: One failed; names it.
    """
    failed = [check for check in checks if not check.passed]
    if failed:
        raise VerificationError(
            "the fused network failed its verification",
            where=", ".join(check.name for check in failed),
            why="; ".join(
                f"{c.name}: error {c.error:.2e}, tolerance {c.tolerance:.0e} {c.detail}"
                for c in failed
            ),
            how="check the members' weights, or use verify=False to get the network anyway",
        )
    return Verification(tuple(checks))
