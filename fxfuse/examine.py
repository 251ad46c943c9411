"""What stands between members and the network that is handed over: is it sound, and is it right."""

from __future__ import annotations

import warnings
from math import isfinite

from fxfuse.coupling import CouplingGraph
from fxfuse.errors import NothingToFuseError, VerificationError
from fxfuse.verify import Check, Verification, permutation_of, wrong_groups


def check_free(graph: CouplingGraph) -> None:
    """Checks that something in the network can be fused or pruned.

    Raises:
        NothingToFuseError: No parameter has a free dimension.
    """
    if graph.groups:
        return
    if not list(graph.captured.module.parameters()):
        raise NothingToFuseError(
            "nothing in this network can be fused",
            why="it has no parameters",
            how="pass networks with trained weights",
        )
    reasons = [r for r in graph.frozen.values() if r.node]
    reasons.sort(key=lambda reason: reason.interface)
    raise NothingToFuseError(
        "nothing in this network can be fused",
        where=f"{reasons[0].node}  {reasons[0].source}".rstrip() if reasons else "",
        why="every dimension of every parameter is frozen"
        + (f"; the first: {reasons[0].why}" if reasons else ""),
        how="see fxfuse.analyze(...).frozen for all reasons; "
        + (
            "freeze, share and ignore may ask for too much"
            if graph.asked
            else "an operator without a rule can get one in fxfuse/rules/"
        ),
    )


def only_what_moves(graph: CouplingGraph) -> tuple[CouplingGraph, Check]:
    """Freezes the groups that the permutation oracle cannot move, with a loud warning.

    Args:
        graph: The analysis of a network.

    Returns:
        The analysis without these groups, and what the oracle says of it.
    """
    check = permutation_of(graph)
    wrong = () if check.passed or not isfinite(check.error) else wrong_groups(graph)
    if not wrong:
        return graph, check
    names = [g.name for g in wrong]
    warnings.warn(
        f"coupling groups {names} changed the network when permuted, so they are frozen and one "
        "member's weights are kept there. A rule of fxfuse is wrong: please report the network.",
        stacklevel=3,
    )
    graph = graph.freezing(names, "the permutation oracle could not move this group")
    return graph, permutation_of(graph)


def check_verified(verification: Verification) -> None:
    """Checks that every oracle held.

    Raises:
        VerificationError: One failed; names it.
    """
    failed = [check for check in verification.checks if not check.passed]
    if failed:
        raise VerificationError(
            "the fused network failed its verification and is not handed over",
            where=", ".join(check.name for check in failed),
            why="; ".join(
                f"{c.name}: error {c.error:.2e}, tolerance {c.tolerance:.0e} {c.detail}"
                for c in failed
            ),
            how="check the members' weights; verify=False returns the network all the same",
        )
