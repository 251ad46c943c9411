"""The typer application: one command per file of this package."""

from __future__ import annotations

import signal
import sys
import warnings
from types import FrameType
from typing import NoReturn, TextIO

import typer

from fxfuse.cli.analyze import analyze
from fxfuse.cli.demo import demo
from fxfuse.cli.explain import explain
from fxfuse.cli.fuse import fuse
from fxfuse.cli.guard import guarded
from fxfuse.cli.show import err
from fxfuse.cli.verify import verify

app = typer.Typer(
    name="fxfuse",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


@app.callback()
def _fxfuse() -> None:
    """Fuse several trained networks of one architecture into one.

    Exit status: 0 done; 1 an oracle failed, or `analyze --strict` found an operator without a rule;
    2 bad input; 70 a fault of fxfuse.
    """


for _command in (demo, analyze, explain, fuse, verify):
    app.command()(guarded(_command))


def main() -> None:
    """Entry point of the `fxfuse` script."""
    warnings.showwarning = _show_warning
    # So that a terminated run removes its unfinished folder, as an interrupted one does.
    signal.signal(signal.SIGTERM, _terminate)
    app()


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    err.print(f"warning: {message}", style="yellow", markup=False)


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)
