"""Write what `gains` measured into docs/paper/gains.md, or check that the page is up to date.

python -m benchmarks.paper.gains_page           # rewrite the page
python -m benchmarks.paper.gains_page --check   # exit with 1 when it is out of date
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.pages import update, with_tables
from benchmarks.paper.gains import RESULTS
from benchmarks.paper.gains_tables import markdown
from benchmarks.paper.runner import PAGES

MARK = "gains"


def section(found: dict[str, Any]) -> str:
    """All that stands between the marks."""
    cases = found["cases"]
    seeds = len({case["seed"] for case in cases})
    budgets = ", ".join(f"{b:g}" for b in sorted({case["budget"] for case in cases}))
    about = (
        f"`python -m benchmarks.paper.gains`; {seeds} seeds, {len(cases)} runs, `auto` with "
        f"{budgets} CPU seconds of matching, torch {found['torch']}. {found['conditions']}"
    )
    return f"\n{about}{origin(cases)}\n\n{markdown(cases)}\n\n"


def origin(cases: Sequence[dict[str, Any]]) -> str:
    """Which rows were measured with which commit, where that was not one for all."""
    rows: dict[str, dict[str, dict[str, None]]] = {}
    for case in cases:
        for name, row in case["rows"].items():
            of = rows.setdefault(row.get("commit", ""), {}).setdefault(name, {})
            of[case["network"]] = None
    if len(rows) < 2:
        return ""
    networks = {case["network"] for case in cases}

    def said(name: str, of: Iterable[str]) -> str:
        return f"*{name}*" if {*of} == networks else f"*{name}* ({', '.join(of)})"

    told = [
        f"{', '.join(said(name, of) for name, of in names.items())} "
        f"{f'at `{commit}`' if commit else 'earlier'}"
        for commit, names in rows.items()
    ]
    return f" Not all rows are of one run: {'; '.join(told)}."


def main(arguments: list[str] | None = None) -> int:
    """Rewrite or check the page, and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit 1 if out of date"
    )
    parser.add_argument("--page", type=Path, default=PAGES / "gains.md")
    parser.add_argument("--results", type=Path, default=RESULTS)
    asked = parser.parse_args(arguments)
    found = json.loads(asked.results.read_text(encoding="utf-8"))
    text = with_tables(asked.page.read_text(encoding="utf-8"), MARK, section(found))
    return update({asked.page: text}, "python -m benchmarks.paper.gains_page", check=asked.check)


if __name__ == "__main__":
    sys.exit(main())
