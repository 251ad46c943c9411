"""JSON of strangers: its length and number of values are checked before anything is made of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

#: Most characters and values of a file that lists tensors, names or options: 200 MB of memory.
_LONGEST, _MOST = 1 << 25, 1 << 22


def read_json(path: Path) -> Any:
    """Read a file of moderate size.

    Raises:
        OSError: It cannot be opened.
        ValueError: It is no JSON, or too large.
    """
    with path.open("rb") as file:
        content = file.read(_LONGEST + 1)
    return parse_json(content.decode("utf-8"), _LONGEST, _MOST)


def parse_json(text: str, longest: int, most: int) -> Any:
    """Read a text of so many characters and values at most.

    Raises:
        ValueError: It is no JSON, or too large.
    """
    if len(text) > longest:
        raise ValueError(f"it is longer than {longest:,} characters")
    # Each value but the first of a container has one of these before it.
    if sum(text.count(mark) for mark in ",[{") > most:
        raise ValueError(f"it holds more than {most:,} values")
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("its parts lie too deep in each other") from error
