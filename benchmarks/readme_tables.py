"""Write the demo's tables into the docs, or check that they are up to date.

python benchmarks/readme_tables.py           # rewrite docs/demo.md and docs/when-not-to-fuse.md
python benchmarks/readme_tables.py --check   # exit with 1 when one of them is out of date
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.pages import update, with_tables
from fxfuse.cli.demo.table import to_markdown

ROOT = Path(__file__).resolve().parent.parent
MARK = "demo"


def controls_table(results: dict[str, Any]) -> str:
    """Return, for every fused row, its control and how far apart they are, in Markdown."""
    lines = []
    for setting in results["settings"]:
        rows = {row["name"]: row["accuracy"] for row in setting["rows"]}
        lines += [
            f"**{setting['name'].capitalize()}**",
            "",
            "| fused, % | control, % | difference, points | fused ahead in |",
            "| --- | --- | ---: | ---: |",
        ]
        for row in setting["rows"]:
            if row["control"] is not None:
                lines.append(_pair(row["name"], row["control"], rows))
        lines.append("")
    # With a blank line, or the closing mark would be read as a row of the table.
    return "\n".join(lines) + "\n"


def _pair(name: str, control: str, rows: dict[str, dict[str, Any]]) -> str:
    fused, other = rows[name], rows[control]
    seeds = list(zip(fused["seeds"], other["seeds"], strict=True))
    ahead = sum(mine > theirs for mine, theirs in seeds)
    level = sum(mine == theirs for mine, theirs in seeds)
    count = f"{ahead} of {len(seeds)}" + (f", level in {level}" if level else "")
    # From rounded means, so that the difference is that of the numbers shown.
    mine, theirs = (round(100 * row["mean"], 1) for row in (fused, other))
    cells = [f"{name}: {mine:.1f}", f"{control}: {theirs:.1f}", f"{mine - theirs:+.1f}", count]
    return f"| {' | '.join(cells)} |"


def main() -> int:
    """Rewrite or check the pages, and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit 1 if out of date"
    )
    parser.add_argument("--demo", type=Path, default=ROOT / "docs" / "demo.md")
    parser.add_argument("--controls", type=Path, default=ROOT / "docs" / "when-not-to-fuse.md")
    parser.add_argument(
        "--results", type=Path, default=ROOT / "benchmarks" / "results" / "demo.json"
    )
    options = parser.parse_args()
    results = json.loads(options.results.read_text(encoding="utf-8"))
    pages = {options.demo: to_markdown(results), options.controls: controls_table(results)}
    wanted = {
        path: with_tables(path.read_text(encoding="utf-8"), MARK, tables)
        for path, tables in pages.items()
    }
    return update(wanted, "python benchmarks/readme_tables.py", check=options.check)


if __name__ == "__main__":
    sys.exit(main())
