"""What a user sees when a command fails: a message and an exit status, never a traceback."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import typer

from fxfuse.cli.show import err
from fxfuse.errors import FxfuseError

P = ParamSpec("P")
R = TypeVar("R")

#: Bad input, as for a misspelt option.
BAD_INPUT = 2
#: EX_SOFTWARE of sysexits.h: the fault is ours.
INTERNAL = 70


def guarded(command: Callable[P, R]) -> Callable[P, R]:
    """Turns exceptions of a command into a message on stderr and an exit status.

    With `FXFUSE_DEBUG` set in the environment, exceptions pass through unchanged.
    """

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if os.environ.get("FXFUSE_DEBUG"):
            return command(*args, **kwargs)
        try:
            return command(*args, **kwargs)
        except (typer.Exit, typer.Abort, typer.BadParameter, BrokenPipeError):
            raise
        except FxfuseError as error:
            _say(f"error: {error}")
            raise typer.Exit(BAD_INPUT) from None
        except OSError as error:
            # A full disk, a folder without permission: the user's to mend, not ours.
            _say(f"error: {error}")
            raise typer.Exit(BAD_INPUT) from None
        except Exception as error:
            first_line = str(error).strip().split("\n")[0]
            _say(f"internal error: {type(error).__name__}: {first_line}")
            _say("  This is a fault of fxfuse. FXFUSE_DEBUG=1 shows where it happened.")
            raise typer.Exit(INTERNAL) from None

    return run


def _say(message: str) -> None:
    err.print(message, style="red", markup=False, highlight=False, soft_wrap=True)
