"""Write docs/errors.md from the classes of fxfuse.errors and what fxfuse says to wrong calls.

python -m benchmarks.errors_page           # rewrite the page
python -m benchmarks.errors_page --check   # exit with 1 when it is out of date
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable
from pathlib import Path

from benchmarks import wrong_calls
from benchmarks.pages import run
from benchmarks.wrong_calls import Answer
from fxfuse import errors
from fxfuse.errors import FxfuseError

PAGE = Path(__file__).resolve().parent.parent / "docs" / "errors.md"
_HEAD = """# Errors

Every error that fxfuse raises on purpose is a `fxfuse.FxfuseError`. It has four parts:

- `what` went wrong,
- `where`: graph node and source line, parameter, file or option,
- `why`,
- `how` to fix it.

On the command line bad input exits with 2, without a traceback. `FXFUSE_DEBUG=1` shows it. A fault
of fxfuse exits with 70.

## Classes

| error | cause | usual fix |
| --- | --- | --- |
"""
_PYTHON = """
## Wrong calls in Python

Here `a`, `b` and `c` are three trained networks of one class, `x` is an example batch and `many`
are calibration inputs. `deeper`, `more_classes`, `in_float64` and `not_finite` are networks that do
not fit the others. `result` is the fusion of `a` and `b`, saved in the folder `kept`.

"""
_COMMANDS = """
## Wrong calls on the command line

The working directory holds two checkpoints, a module `nets.py` with the factory `net`, a file of
inputs of the wrong shape, a recipe with mistakes, and the result `kept`.

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
    return "\n".join(
        [
            _HEAD + "\n".join(lines),
            _PYTHON + table(wrong_calls.in_python()),
            _COMMANDS + table(wrong_calls.on_the_command_line()),
        ]
    )


def table(answers: Iterable[Answer]) -> str:
    """What fxfuse says to each call.

    Raises:
        ValueError: A message does not say how to fix it.
    """
    lines = ["| call | message | how to fix it |", "| --- | --- | --- |"]
    for call, what, how in answers:
        if not how:
            raise ValueError(f"{call}: the message {what!r} does not say how to fix it")
        cells = (f"`` {call} ``" if "`" in call else f"`{call}`", what, how)
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join([*lines, ""])


def pages() -> dict[Path, str]:
    """The page, and what it should hold."""
    return {PAGE: page()}


if __name__ == "__main__":
    sys.exit(run(__doc__, "python -m benchmarks.errors_page", pages))
