"""Consoles and tables."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from fxfuse.verify import Check

#: Width of what is written into a file or a pipe, which has none of its own.
_WIDTH = 120

out = Console(soft_wrap=True)
if not out.is_terminal:
    out = Console(soft_wrap=True, width=_WIDTH)
#: Messages and progress: standard output carries results only, so that it can be piped.
err = Console(stderr=True)


def print_json(value: object) -> None:
    """Prints JSON for another program to read."""
    out.print(json.dumps(value, indent=2, ensure_ascii=False), markup=False, highlight=False)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """A plain table; numbers are aligned to the right."""
    result = Table(title=title, title_justify="left", title_style="bold")
    lines = [list(row) for row in rows]
    for position, column in enumerate(columns):
        numeric = all(isinstance(line[position], int | float) for line in lines)
        result.add_column(column, justify="right" if numeric and lines else "left")
    for line in lines:
        result.add_row(*(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in line))
    return result


def checks_table(checks: Iterable[Check]) -> Table:
    """The oracles that ran, with their errors and tolerances."""
    rows = [(c.name, c.error, c.tolerance, "passed" if c.passed else "FAILED") for c in checks]
    return table("Verification", ("oracle", "error", "tolerance", "result"), rows)


def checks_markdown(checks: Iterable[Check]) -> str:
    """The same for a Markdown page."""
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


def checks_json(checks: Iterable[Check]) -> list[dict[str, Any]]:
    """The same for `--json`."""
    return [
        {
            "name": c.name,
            "error": _finite(c.error),
            "tolerance": _finite(c.tolerance),
            "passed": c.passed,
            "detail": c.detail,
        }
        for c in checks
    ]


def _finite(value: float) -> float | None:
    """JSON has no infinity, which is the tolerance of an oracle that claims nothing."""
    return value if math.isfinite(value) else None
