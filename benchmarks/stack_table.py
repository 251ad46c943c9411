"""Write the table of benchmarks/stack.py into docs/how-to/stack.md, or check that it is up to date.

python benchmarks/stack_table.py           # rewrite the page's table
python benchmarks/stack_table.py --check   # exit with 1 when it is out of date
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.pages import run, with_tables

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "stack.json"
PAGE = ROOT / "docs" / "how-to" / "stack.md"
MARK = "stack"
WAYS = ("sequential", "vmap", "stack")
MODES = ("eager", "compiled")


def table(results: dict[str, Any]) -> str:
    """Milliseconds of every way, and how the stack compares with the better of the others."""
    heads = [f"{way}, {mode}" for mode in MODES for way in WAYS]
    lines = [
        f"| network | input | batch | {' | '.join(heads)} | stack / best, eager | compiled |",
        f"| --- | --- | ---: | {' | '.join('---:' for _ in heads)} | ---: | ---: |",
    ]
    for row in results["rows"]:
        times = [f"{row[mode][way]:.3g}" for mode in MODES for way in WAYS]
        ratios = [f"{row[f'{mode} ratio']:.2f}" for mode in MODES]
        shape = " x ".join(map(str, row["shape"]))
        cells = [row["network"], shape, str(row["batch"]), *times, *ratios]
        lines.append(f"| {' | '.join(cells)} |")
    about = results["environment"]
    threads = f"{about['threads']} thread{'s' if about['threads'] > 1 else ''}"
    lines += [
        "",
        f"Milliseconds for {results['members']} members on {results['card'] or about['cpu']} "
        f"({threads}), medians over {results['rounds']} rounds, float32, no gradients; torch "
        f"{about['torch']}, torchvision {about['torchvision']}. *Best* is the faster one of "
        "sequential and vmap in the same mode.",
    ]
    return "\n".join(lines) + "\n"


def pages() -> dict[Path, str]:
    """The page, and what it should hold."""
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    return {PAGE: with_tables(PAGE.read_text(encoding="utf-8"), MARK, table(results))}


if __name__ == "__main__":
    sys.exit(run(__doc__, "python benchmarks/stack_table.py", pages))
