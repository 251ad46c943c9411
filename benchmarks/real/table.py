"""Writes the tables of docs/real-networks.md from benchmarks/results/real/*.json.

python -m benchmarks.real.table [--check]
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.pages import run, with_range, with_tables

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "real"
PAGE = ROOT / "docs" / "real-networks.md"
_MLP_COLUMNS = (
    "best member",
    "fused",
    "best member, the same seconds of a plain loop",
    "ensemble",
)

_MINILM_COLUMNS = (
    "torch-pruning",
    "torch-pruning + matching",
    "l2, no refit",
    "obs + refit",
    "obs + refit + matching",
)


def pages() -> Mapping[Path, str]:
    """The page, as the results say."""
    text = PAGE.read_text(encoding="utf-8")
    for name, table in (("mlps", mlps), ("spliceai", spliceai), ("minilm", minilm)):
        content = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        text = with_tables(text, name, table(content["rows"]))
    return {PAGE: text}


def mlps(rows: Sequence[Mapping[str, Any]]) -> str:
    """Accuracy by number of members."""
    lines = [
        f"| members | {' | '.join(_MLP_COLUMNS)} | fused − best member |",
        f"|---:|{'---:|' * (len(_MLP_COLUMNS) + 1)}",
    ]
    for count in dict.fromkeys(row["members"] for row in rows):
        own = [row for row in rows if row["members"] == count]
        cells = [with_range([row[name] for row in own], 2) for name in _MLP_COLUMNS]
        gains = [row["gain over the best member"] for row in own]
        gain = f"{statistics.mean(g[0] for g in gains):+.2f}"
        worse = sum(g[2] < 0 for g in gains)
        lines.append(
            f"| {count} | {' | '.join(cells)} | {gain}, {worse} of {len(own)} significantly worse |"
        )
    seeds = len({row["seed"] for row in rows})
    seconds = with_range([row["seconds"] for row in rows], 0)
    return "\n".join([*lines, "", _said(seeds, "images", f"{seconds} CPU s a run"), ""])


def spliceai(rows: Sequence[Mapping[str, Any]]) -> str:
    """KL to the ensemble, and called sites."""
    lines = [
        "| size | matching, s | sample | result | KL of its start, 1e-4 | of the result | "
        "gain | best members side by side | sites | steps | CPU s |",
        "|---:|---:|---:|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        gain = [1e4 * x for x in row["gain over the start"]]
        beside = 1e4 * row["KL of the best members side by side"]
        found, sites = row["sites found, and of the ensemble"]
        lines.append(
            f"| {row['size']:g} | {row['seconds of matching']:g} | {row['seed']} | "
            f"{row['handed over']} | "
            f"{1e4 * row['KL of the start']:.3f} | {1e4 * row['KL of the fused']:.3f} | "
            f"{gain[0]:.3f} [{gain[1]:.3f}, {gain[2]:.3f}] | "
            f"{beside:.3f} | {found} of {sites} | {row['steps']} | {row['seconds']:.0f} |"
        )
    each = ", ".join(f"{1e4 * x:.3f}" for x in rows[0]["KL of each member"])
    said = (
        f"Members by themselves: {each}. {_said(len({row['seed'] for row in rows}), 'windows', '')}"
    )
    return "\n".join([*lines, "", said, ""])


def minilm(rows: Sequence[Mapping[str, Any]]) -> str:
    """Spearman's correlation by size."""
    lines = [
        f"| size | samples | {' | '.join(_MINILM_COLUMNS)} | CPU s |",
        f"|---:|---:|{'---:|' * (len(_MINILM_COLUMNS) + 1)}",
    ]
    for size in sorted({row["size"] for row in rows}, reverse=True):
        own = [row for row in rows if row["size"] == size]
        cells = [with_range([row[name] for row in own], 3) for name in _MINILM_COLUMNS]
        seconds = with_range([row[f"seconds of {_MINILM_COLUMNS[-1]}"] for row in own], 0)
        lines.append(f"| {size} | {len(own)} | {' | '.join(cells)} | {seconds} |")
    return "\n".join([*lines, ""])


def _said(samples: int, what: str, cost: str) -> str:
    many = f"{samples} samples" if samples > 1 else "One sample"
    return f"{many} of the calibration {what}{'; ' + cost if cost else ''}."


if __name__ == "__main__":
    sys.exit(run(__doc__, "python -m benchmarks.real.table", pages))
