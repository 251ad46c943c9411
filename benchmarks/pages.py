"""Tables that scripts write into pages, between two marks."""

from __future__ import annotations


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
