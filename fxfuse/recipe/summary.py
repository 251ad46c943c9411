"""`summary.md`: what a fusion did, for people."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fxfuse.report.content import Network
from fxfuse.result import FusionResult
from fxfuse.verify import Check


def summary(result: FusionResult, networks: Sequence[Network], trained: str) -> str:
    """Markdown about a fusion.

    Args:
        result: What was fused.
        networks: What was measured, if anything was.
        trained: What training did, or "".
    """
    parts = [result.plan.summary()]
    if result.choice:
        parts.append(f"Matched to the ensemble: {result.choice}.\n")
    if trained:
        parts.append(f"{trained}\n")
    if networks:
        parts.append(_networks(networks))
    return "\n".join([*parts, checks_markdown(result.verification.checks)])


def checks_markdown(checks: Iterable[Check]) -> str:
    """The oracles that ran, with their errors and tolerances."""
    lines = [
        "## Verification",
        "",
        "| oracle | error | tolerance | result |",
        "|---|---:|---:|---|",
    ]
    for c in checks:
        result = "passed" if c.passed else "FAILED"
        lines.append(f"| {c.name} | {c.error:.3g} | {c.tolerance:.3g} | {result} |")
    if len(lines) == 4:
        lines = [*lines[:2], "Skipped at the caller's wish."]
    return "\n".join(lines) + "\n"


def _networks(networks: Sequence[Network]) -> str:
    lines = [
        "## Networks",
        "",
        "| network | accuracy, % | agrees with the ensemble, % | KL, nats | parameters |",
        "|---|---:|---:|---:|---:|",
    ]
    for n in networks:
        cells = (_cell(n.accuracy, 2), _cell(n.agreement, 2), _cell(n.divergence, 4))
        lines.append(f"| {n.name} | {' | '.join(cells)} | {n.parameters:,} |")
    return "\n".join(lines) + "\n"


def _cell(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
