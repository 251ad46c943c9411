"""How an object shows itself: a title and a few rows, as text and in a notebook."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from textwrap import shorten

#: Lines under the title, and characters in a line.
_ROWS, _WIDTH = 9, 100

#: A title, and rows: a label, and what it says. Of a list, as much is shown as there is room for.
Description = tuple[str, Mapping[str, str | Sequence[str]]]


class Readable:
    """An object that `print` and a notebook show in at most ten lines."""

    def described(self) -> Description:
        """Return the title, and the rows in order; those that say nothing are left out."""
        raise NotImplementedError

    def __repr__(self) -> str:
        title, rows = self._shown()
        label = max((len(name) for name in rows), default=0)
        width = _WIDTH - label - 4
        lines = (f"  {name:<{label}}  {_one_line(said, width)}" for name, said in rows.items())
        return "\n".join([title, *lines])

    def _repr_html_(self) -> str:
        title, rows = self._shown()
        left = "style='text-align: left'"
        cells = (
            f"<tr><th {left}>{escape(name)}</th>"
            f"<td {left}>{escape(_one_line(said, 2 * _WIDTH))}</td></tr>"
            for name, said in rows.items()
        )
        return f"<div><b>{escape(title)}</b><table>{''.join(cells)}</table></div>"

    def _shown(self) -> Description:
        title, rows = self.described()
        said = {name: text for name, text in rows.items() if text}
        if len(said) > _ROWS:
            rest = list(said)[_ROWS - 1 :]
            said = {name: text for name, text in said.items() if name not in rest}
            said["..."] = f"and {len(rest)} more: {', '.join(rest)}"
        return title, said


def counted(count: int, noun: str) -> str:
    """Return a number and its noun, which forms its plural with an s: `2 groups`."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def _one_line(said: str | Sequence[str], width: int) -> str:
    if not isinstance(said, str):
        said = _as_many_as_fit(said, width)
    return shorten(said, width, placeholder=" ...")


def _as_many_as_fit(texts: Sequence[str], width: int) -> str:
    """Return the first texts, at least one, and how many more there are."""
    for count in range(len(texts), 0, -1):
        more = len(texts) - count
        line = ", ".join(texts[:count]) + (f" and {more:,} more" if more else "")
        if len(line) <= width:
            return line
    return line
