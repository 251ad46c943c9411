"""The typer application: one command per file of this package."""

from __future__ import annotations

import logging
import signal
import sys
import warnings
from types import FrameType
from typing import NoReturn, TextIO

import typer

from fxfuse.cli.lazy import LazyGroup, stand_ins
from fxfuse.cli.show import err

app = typer.Typer(
    name="fxfuse",
    cls=LazyGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


@app.callback()
def _fxfuse() -> None:
    """Fuse several trained networks of one architecture into one.

    Exit status: 0 done; 1 an oracle failed, or `analyze --strict` found an operator without a rule;
    2 bad input; 70 a fault of fxfuse; 130 interrupted; 143 terminated.
    """


stand_ins(app)


def main() -> None:
    """Entry point of the `fxfuse` script."""
    warnings.showwarning = _show_warning
    # It warns of a CUDA toolkit without a GPU, which is no one's concern here.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
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
