"""Write docs/errors.md from the classes of fxfuse.errors, or check that it is up to date.

python -m benchmarks.errors_page           # rewrite the page
python -m benchmarks.errors_page --check   # exit with 1 when it is out of date
"""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

from benchmarks.pages import run
from fxfuse import errors
from fxfuse.errors import FxfuseError

PAGE = Path(__file__).resolve().parent.parent / "docs" / "errors.md"
_HEAD = """# Errors

Every error that fxfuse raises on purpose is a `fxfuse.FxfuseError` with four parts: `what` went
wrong, `where` (graph node and source line, parameter, file or option), `why`, and `how` to fix it.
On the command line bad input exits with 2, and no traceback is shown; `FXFUSE_DEBUG=1` shows it. A
fault of fxfuse exits with 70.

| error | cause | usual fix |
| --- | --- | --- |
"""


def parts(kind: type[FxfuseError]) -> tuple[str, str]:
    """Cause and fix of a class, from its docstring."""
    cause, _, fix = (inspect.getdoc(kind) or "").partition("\n\nFix: ")
    return " ".join(cause.split()), " ".join(fix.split())


def classes() -> list[type[FxfuseError]]:
    """All classes but the base, in the order of the file."""
    found = [value for value in vars(errors).values() if inspect.isclass(value)]
    return [kind for kind in found if issubclass(kind, FxfuseError) and kind is not FxfuseError]


def page() -> str:
    """The page."""
    lines = [f"| `{kind.__name__}` | {' | '.join(parts(kind))} |" for kind in classes()]
    return _HEAD + "\n".join(lines) + "\n"


def pages() -> dict[Path, str]:
    """The page, and what it should hold."""
    return {PAGE: page()}


if __name__ == "__main__":
    sys.exit(run(__doc__, "python -m benchmarks.errors_page", pages))
