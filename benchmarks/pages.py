"""Tables that scripts write into pages, between two marks."""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path


def marks(name: str) -> tuple[str, str]:
    """The lines between which the tables of that name stand."""
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"


def with_tables(page: str, name: str, tables: str) -> str:
    """`page` with what stands between the marks replaced by `tables`.

    Raises:
        ValueError: The marks are missing.
    """
    begin, end = marks(name)
    before, found, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"the page lacks the lines {begin} and {end}")
    return f"{before}{begin}\n{tables}{end}{after}"


def with_range(values: Sequence[float], digits: int) -> str:
    """The mean of some values, and their range where it shows at that many digits."""
    mean = f"{statistics.mean(values):.{digits}f}"
    if max(values) - min(values) < 10**-digits:
        return mean
    return f"{mean} [{min(values):.{digits}f}, {max(values):.{digits}f}]"


def run(doc: str | None, command: str, pages: Callable[[], Mapping[Path, str]]) -> int:
    """The command line of a script that writes pages: rewrites them, or with --check only looks.

    Args:
        doc: What the script says of itself.
        command: What rewrites the pages.
        pages: For each page, what it should hold.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if stale")
    options = parser.parse_args()
    return update(pages(), command, check=options.check)


def update(pages: Mapping[Path, str], command: str, *, check: bool) -> int:
    """Writes pages that are not as they should be, or only says which these are.

    Args:
        pages: For each page, what it should hold.
        command: What rewrites them.
        check: Whether to change nothing.

    Returns:
        The exit status: 1 if `check` finds a page out of date.
    """
    stale = {
        page: text
        for page, text in pages.items()
        if not page.exists() or page.read_text(encoding="utf-8") != text
    }
    for page, text in stale.items():
        if check:
            print(f"{page.name} is out of date: run {command}", file=sys.stderr)
        else:
            page.write_text(text, encoding="utf-8")
    return int(check and bool(stale))
