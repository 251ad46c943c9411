"""Writes the tables of docs/rivals.md from benchmarks/results.

python -m benchmarks.rivals.table [--check]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.pages import run, with_range, with_tables

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "rivals.md"
Rows = Sequence[Mapping[str, Any]]
_NAMES = {
    "no step": "**`fxfuse`, no step of training**",
    "matched": "`fxfuse`, 60 CPU seconds of matching",
    "best member, the same seconds of a plain loop": "best member, distilled for as long",
}


def pages() -> Mapping[Path, str]:
    """The page, as the results say."""
    text = PAGE.read_text(encoding="utf-8")
    for name, table in _TABLES.items():
        text = with_tables(text, name, table())
    return {PAGE: text}


def halves() -> str:
    """CIFAR-10, five classes a member: our methods and ZipIt's own code."""
    ours = [row for row in _rows("cifar10.json") if row["setting"] == "halves" and row["size"] == 1]
    theirs = _rows("rivals/zip_it.json")
    rows = [
        *(row | {"method": f"{row['method']}, ZipIt's own code"} for row in theirs),
        *(row | {"method": _NAMES.get(row["row"], f"{row['row']}, here")} for row in ours),
    ]
    lines = [
        "| method | accuracy, % | share of the way, % | KL to the ensemble | CPU s |",
        "|---|---:|---:|---:|---:|",
        f"| best member | {_range(rows, 'best member', 1)} | 0 | | |",
    ]
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        lines.append(
            f"| {method} | {_range(own, 'accuracy', 1)} | {_range(own, 'share of the way', 0, 100)}"
            f" | {_range(own, 'KL to the ensemble', 3)} | {_range(own, 'CPU seconds', 0)} |"
        )
    lines.append(f"| ensemble, twice the size | {_range(rows, 'ensemble', 1)} | 100 | 0 | |")
    pairs = len({row["seed"] for row in ours})
    return "\n".join([*lines, "", f"{pairs} pairs of members; mean and range.", ""])


def mlps() -> str:
    """Published MLPs: neuron interpolation's own code and ours."""
    rows = _rows("rivals/neuron_interpolation.json")
    counts = sorted({row["members"] for row in rows})
    lines = [
        f"| method | {' | '.join(f'{count} members' for count in counts)} |",
        f"|---|{'---:|' * len(counts)}",
    ]
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        cells = [_range([r for r in own if r["members"] == n], "accuracy", 2) for n in counts]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    for name in ("best member", "ensemble"):
        cells = [_range([r for r in rows if r["members"] == n], name, 2) for n in counts]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    seeds = len({row["seed"] for row in rows})
    said = f"Accuracy in % on the official test set; {seeds} samples of the inputs, mean and range."
    return "\n".join([*lines, "", said, ""])


_TABLES: dict[str, Callable[[], str]] = {"halves": halves, "mlps": mlps}


def _rows(name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((RESULTS / name).read_text(encoding="utf-8"))["rows"]
    return found


def _range(rows: Rows, name: str, digits: int, times: float = 1) -> str:
    return with_range([times * row[name] for row in rows], digits) if rows else ""


if __name__ == "__main__":
    sys.exit(run(__doc__, "python -m benchmarks.rivals.table", pages))
