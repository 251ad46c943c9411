"""Write the demo's tables into README.md, or check that they are up to date.

python benchmarks/readme_tables.py           # rewrite README.md
python benchmarks/readme_tables.py --check   # exit with 1 when it is out of date
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from fxfuse.demo.table import to_markdown

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- demo:begin -->", "<!-- demo:end -->"


def with_tables(readme: str, tables: str) -> str:
    """Return `readme` with what stands between the two marks replaced by `tables`.

    Raises:
        ValueError: The marks are missing.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md lacks the lines {BEGIN} and {END}")
    return f"{before}{begin}\n{tables}{end}{after}"


def main() -> int:
    """Rewrite or check README.md, and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit 1 if out of date"
    )
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument(
        "--results", type=Path, default=ROOT / "benchmarks" / "results" / "demo.json"
    )
    options = parser.parse_args()
    readme = options.readme.read_text(encoding="utf-8")
    results = json.loads(options.results.read_text(encoding="utf-8"))
    wanted = with_tables(readme, to_markdown(results))
    if options.check:
        if readme != wanted:
            print(
                "README.md is out of date: run python benchmarks/readme_tables.py", file=sys.stderr
            )
        return int(readme != wanted)
    options.readme.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
