"""`summary.md`: what a fusion did, for people."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fxfuse.api.result import FusionResult
from fxfuse.cli.report.content import Network, measures
from fxfuse.refine.history import History
from fxfuse.verify import Check


def summary(result: FusionResult, networks: Sequence[Network], trained: str) -> str:
    """Write Markdown about a fusion; `trained` is what training did, or ""."""
    parts = [result.plan.summary()]
    if result.raw_note and not trained:
        parts.append(f"**{result.raw_note}**\n")
    if result.refit:
        parts.append(f"Refitted: {result.refit}.\n")
    if result.history:
        parts.append(_history(result.history))
    if trained:
        parts.append(f"{trained}\n")
    if networks:
        parts.append(networks_text(networks))
    return "\n".join([*parts, _checks(result.verification.checks)])


def _checks(checks: Sequence[Check]) -> str:
    """Return the oracles that ran, with their errors and tolerances."""
    if not checks:
        return "## Verification\n\nSkipped at the caller's wish.\n"
    rows = [
        (c.name, f"{c.error:.3g}", f"{c.tolerance:.3g}", "passed" if c.passed else "FAILED")
        for c in checks
    ]
    return _table("Verification", ("oracle", "error", "tolerance", "result"), "---:|---:|---", rows)


def _history(history: History) -> str:
    """Return the candidates, and which of them the network is."""
    columns = history.table()
    rule = "---:|---|---|---:|---"
    rows = _table("Candidates", tuple(columns), rule, zip(*columns.values(), strict=True))
    return f"{rows}\n{history.described()[0]}. The task is `{history.task}`: {history.why}.\n"


def networks_text(networks: Sequence[Network]) -> str:
    """Return networks beside each other, with what was measured."""
    columns = {
        "network": [n.name for n in networks],
        **measures(networks),
        "parameters": [f"{n.parameters:,}" for n in networks],
    }
    rule = "|".join(["---:"] * (len(columns) - 1))
    return _table("Networks", tuple(columns), rule, zip(*columns.values(), strict=True))


def _table(title: str, columns: Sequence[str], rule: str, rows: Iterable[Sequence[str]]) -> str:
    """Return a heading and a table; `rule` is how the columns behind the first stand."""
    lines = [f"## {title}", "", f"| {' | '.join(columns)} |", f"|---|{rule}|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"
