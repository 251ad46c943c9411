"""What a user sees when a command fails: a message and an exit status, never a traceback."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Any, TypeVar, get_type_hints

import typer

from fxfuse.cli.show import err, out
from fxfuse.cli.wording import naming_flags
from fxfuse.errors import FxfuseError

R = TypeVar("R")

#: Bad input, as for a misspelt option.
BAD_INPUT = 2
#: EX_SOFTWARE of sysexits.h: the fault is ours.
INTERNAL = 70
#: 128 and the number of SIGINT, as a shell says it.
INTERRUPTED = 130

Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="Print nothing but errors, and JSON where it is asked for."),
]


def guarded(command: Callable[..., R]) -> Callable[..., R]:
    """Turn exceptions of a command into a message on stderr and an exit status; add `--quiet`.

    With `FXFUSE_DEBUG` set in the environment, exceptions pass through unchanged.
    """

    @functools.wraps(command)
    def run(*args: Any, quiet: bool = False, **kwargs: Any) -> R:
        with _quiet() if quiet else contextlib.nullcontext():
            return guard(*args, **kwargs)

    def guard(*args: Any, **kwargs: Any) -> R:
        if os.environ.get("FXFUSE_DEBUG"):
            return command(*args, **kwargs)
        try:
            return command(*args, **kwargs)
        except KeyboardInterrupt:
            _say("interrupted; nothing that was not finished is left")
            raise typer.Exit(INTERRUPTED) from None
        except (typer.Exit, typer.Abort, typer.BadParameter, BrokenPipeError):
            raise
        except FxfuseError as error:
            _say(f"error: {naming_flags(error, flags)}")
            raise typer.Exit(BAD_INPUT) from None
        except OSError as error:
            # A full disk, a folder without permission: the user's to fix, not ours.
            where = f": {error.filename}" if error.filename else ""
            _say(f"error: {error.strerror or error}{where}")
            raise typer.Exit(BAD_INPUT) from None
        except Exception as error:
            first_line = str(error).strip().split("\n")[0]
            _say(f"internal error: {type(error).__name__}: {first_line}")
            _say("  This is a fault of fxfuse. FXFUSE_DEBUG=1 shows where it happened.")
            raise typer.Exit(INTERNAL) from None

    # What typer reads a command's options from.
    hints = get_type_hints(command, include_extras=True)
    own = inspect.signature(command)
    flags = _flag_names(command, own.parameters)
    parameters = [p.replace(annotation=hints[name]) for name, p in own.parameters.items()]
    option = inspect.Parameter(
        "quiet", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Quiet
    )
    run.__signature__ = own.replace(  # type: ignore[attr-defined]
        parameters=[*parameters, option]
    )
    run.__annotations__ = {**hints, "quiet": Quiet}
    return run


def _flag_names(command: Callable[..., Any], parameters: Iterable[str]) -> dict[str, str]:
    """Return what Python calls the options of a command → flag."""
    found = {name: f"--{name.replace('_', '-')}" for name in parameters}
    if "no_verify" in found:
        found["verify"] = found.pop("no_verify")
    return {**found, **getattr(command, "flag_names", {})}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        was, out.quiet = out.quiet, True
        try:
            yield
        finally:
            out.quiet = was


def _say(message: str) -> None:
    err.print(message, style="red", markup=False, highlight=False, soft_wrap=True)
