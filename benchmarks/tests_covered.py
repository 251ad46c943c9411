"""Keep of a coverage report what is worth committing: the shares, and the files that are behind.

    python -m benchmarks.tests_covered coverage.json

writes benchmarks/results/tests_covered.json; `.ci/coverage` calls it. Exits with 1 when fewer lines
are covered than pyproject.toml demands.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tomllib
from pathlib import Path
from typing import Any

from benchmarks.records import write

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "tests_covered.json"


def shares(summary: dict[str, Any]) -> dict[str, float]:
    """Percent of lines and of branches that ran."""
    branches = summary["num_branches"]
    return {
        "lines": round(100 * summary["covered_lines"] / max(summary["num_statements"], 1), 1),
        "branches": round(100 * summary["covered_branches"] / branches, 1) if branches else 100.0,
    }


def kept(report: dict[str, Any], wanted: float, arguments: str = "") -> dict[str, Any]:
    """The totals, each file with fewer of its lines covered than wanted, what pytest was told."""
    files = {name: shares(file["summary"]) for name, file in sorted(report["files"].items())}
    return {
        "schema": 1,
        "pytest": arguments,
        "python": platform.python_version(),
        "coverage": report["meta"]["version"],
        "date": report["meta"]["timestamp"][:10],
        "total": shares(report["totals"]),
        "statements": report["totals"]["num_statements"],
        "behind": {name: share for name, share in files.items() if share["lines"] < wanted},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("report", type=Path, help="what `coverage json` wrote")
    parser.add_argument("--pytest", default="", help="the arguments that pytest was given")
    options = parser.parse_args()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wanted = project["tool"]["coverage"]["report"]["fail_under"]
    found = kept(json.loads(options.report.read_text(encoding="utf-8")), wanted, options.pytest)
    write(RESULTS, found)
    print(f"{found['total']['lines']} % of lines, {found['total']['branches']} % of branches")
    return int(found["total"]["lines"] < wanted)


if __name__ == "__main__":
    sys.exit(main())
