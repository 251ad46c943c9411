"""Consoles and tables."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

if TYPE_CHECKING:
    from fxfuse.verify import Check

#: Width of what is written into a file or a pipe, which has none of its own.
_WIDTH = 120

out = Console(soft_wrap=True)
if not out.is_terminal:
    out = Console(soft_wrap=True, width=_WIDTH)
#: Messages and progress: standard output carries results only, so that it can be piped.
err = Console(stderr=True)


@contextmanager
def working() -> Iterator[tuple[Callable[[str], AbstractContextManager[object]], Progress]]:
    """Show progress on stderr: what is being done and for how long, and bars with the time left.

    Where that is no terminal, lines say the same: one when a step begins, and one for each tenth.
    Yields a function that says what a block does, and a progress that loops add their bars to.
    """
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    lines = not err.is_terminal and not out.quiet
    shown = err.is_terminal and not out.quiet
    kind = _Lines if lines else Progress
    with kind(*columns, console=err, transient=True, disable=not shown) as progress:

        @contextmanager
        def stage(what: str) -> Iterator[None]:
            task = progress.add_task(what, total=None)
            if lines:
                _say(f"{what} ...")
            try:
                yield
            finally:
                progress.remove_task(task)

        yield stage, progress


class _Lines(Progress):
    """Progress as lines, for a file or a pipe."""

    def update(self, task_id: TaskID, **changes: Any) -> None:
        """Note what is done; say it after each tenth, with the time left."""
        task = self._tasks[task_id]
        before = task.percentage
        super().update(task_id, **changes)
        if task.total and task.percentage // 10 > before // 10:
            done = task.completed / task.total
            left = (self.get_time() - (task.start_time or 0)) * (1 - done) / done
            _say(f"{task.description}: {task.percentage:.0f} %, {left:.0f} s left")


def _say(text: str) -> None:
    err.print(text, markup=False, highlight=False, soft_wrap=True)


def print_json(value: object) -> None:
    """Print JSON for another program to read."""
    was, out.quiet = out.quiet, False
    out.print(json.dumps(value, indent=2, ensure_ascii=False), markup=False, highlight=False)
    out.quiet = was


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """Return a plain table; numbers are aligned to the right."""
    result = Table(title=title, title_justify="left", title_style="bold")
    lines = [list(row) for row in rows]
    for position, column in enumerate(columns):
        numeric = all(_is_number(line[position]) for line in lines)
        result.add_column(column, justify="right" if numeric and lines else "left")
    for line in lines:
        result.add_row(*(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in line))
    return result


def _is_number(cell: object) -> bool:
    return isinstance(cell, int | float) or str(cell).strip("–0123456789,.") == ""


def checks_table(checks: Iterable[Check]) -> Table:
    """Return the oracles that ran, with their errors and tolerances."""
    rows = [(c.name, c.error, c.tolerance, "passed" if c.passed else "FAILED") for c in checks]
    return table("Verification", ("oracle", "error", "tolerance", "result"), rows)


def checks_json(checks: Iterable[Check]) -> list[dict[str, Any]]:
    """Return the same for `--json`."""
    return [
        {
            "name": c.name,
            "error": _finite(c.error),
            "tolerance": _finite(c.tolerance),
            "passed": c.passed,
            "detail": c.detail,
        }
        for c in checks
    ]


def _finite(value: float) -> float | None:
    """JSON has no infinity, which is the tolerance of an oracle that claims nothing."""
    return value if math.isfinite(value) else None
