"""The typer application: one command per file of this package."""

from __future__ import annotations

import logging
import os
import signal
import sys
import warnings
from types import FrameType
from typing import Annotated, NoReturn, TextIO

import typer

import fxfuse
from fxfuse.cli.lazy import LazyGroup, stand_ins
from fxfuse.cli.show import err, out

app = typer.Typer(
    name="fxfuse",
    cls=LazyGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fxfuse {fxfuse.__version__}")
        raise typer.Exit


@app.callback()
def _fxfuse(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_version)
    ] = False,
) -> None:
    """Fuse several trained networks of one architecture into one.

    Exit status: 0 done; 1 an oracle failed, or `analyze --strict` found an operator without a rule;
    2 bad input; 70 a fault of fxfuse; 130 interrupted; 143 terminated.
    """
    if not sys.flags.safe_path:
        # As `python -m` does: a user's own models lie there.
        sys.path[:0] = [folder for folder in (os.getcwd(),) if folder not in sys.path]


stand_ins(app)


def main() -> None:
    """Entry point of the `fxfuse` script."""
    warnings.showwarning = _show_warning
    # It warns of a CUDA toolkit without a GPU, which is no one's concern here.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    reading = logging.getLogger("fxfuse")
    reading.setLevel(logging.INFO)
    reading.addHandler(_Messages())
    # So that a terminated run removes its unfinished folder, as an interrupted one does.
    signal.signal(signal.SIGTERM, _terminate)
    app()


class _Messages(logging.Handler):
    """Shows how checkpoints were read, unless nothing is to be shown."""

    def emit(self, record: logging.LogRecord) -> None:
        """Show a message on stderr: standard output carries results only."""
        if not out.quiet:
            style = "yellow" if record.levelno >= logging.WARNING else "dim"
            err.print(record.getMessage(), style=style, markup=False, highlight=False)


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
