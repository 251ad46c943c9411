"""What a user sees when a command fails: a message and an exit status, never a traceback."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, TypeVar, get_type_hints

import typer
from typer.models import OptionInfo

from fxfuse.cli.show import err, out
from fxfuse.errors import FxfuseError

R = TypeVar("R")

#: Bad input, as for a misspelt option.
BAD_INPUT = 2
#: EX_SOFTWARE of sysexits.h: the fault is ours.
INTERNAL = 70
#: 128 and the number of SIGINT, as a shell says it.
INTERRUPTED = 130

#: An option as Python writes it: its name, `=`, and a value or none.
_OPTION = re.compile(
    r"""\b([a-z]\w*)=(\.\.\.|'[^']*'|"[^"]*"|\[+[^]]*\](?:, \[[^]]*\]\])?|\{[^}]*\}|\w[\w.*/-]*)?"""
)
#: The bare name of an option, or its path in a recipe, where no other word can stand.
_NAME = re.compile(r"\bfuse\.\w+|\b[a-z]+_\w+\b|^[a-z]+(?= must be )|(?<=\bleave )[a-z]+(?= out\b)")
#: What the command line says beside some words of a message.
_BESIDE = {"the arguments that it was trained with": ("model_arg", "num_classes=10")}

Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="Print nothing but errors, and JSON where it is asked for."),
]


def guarded(command: Callable[..., R]) -> Callable[..., R]:
    """Turns exceptions of a command into a message on stderr and an exit status; adds `--quiet`.

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
            _say(f"error: {with_flags(error, flags)}")
            raise typer.Exit(BAD_INPUT) from None
        except OSError as error:
            # A full disk, a folder without permission: for the user to fix, not a fault of ours.
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
    flags = flags_of(hints)
    own = inspect.signature(command)
    parameters = [p.replace(annotation=hints[name]) for name, p in own.parameters.items()]
    option = inspect.Parameter(
        "quiet", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Quiet
    )
    run.__signature__ = own.replace(  # type: ignore[attr-defined]
        parameters=[*parameters, option]
    )
    run.__annotations__ = {**hints, "quiet": Quiet}
    return run


def flags_of(hints: Mapping[str, Any]) -> dict[str, str]:
    """The flag of each option of a command, by its name in Python."""
    found = {}
    for name, hint in hints.items():
        infos = [m for m in getattr(hint, "__metadata__", ()) if isinstance(m, OptionInfo)]
        # These two are also words of torch's messages.
        if infos and name not in ("input", "model"):
            # Within Annotated, the first declaration stands where the default would.
            declared = [infos[0].default, *(infos[0].param_decls or ())]
            flags = (d for d in declared if isinstance(d, str) and d.startswith("--"))
            found[name] = next(flags, f"--{name.replace('_', '-')}")
    return found


def with_flags(error: FxfuseError, flags: Mapping[str, str]) -> FxfuseError:
    """An error that names flags of the command line where it named options of Python."""

    def option(match: re.Match[str]) -> str:
        name, value = match[1], (match[2] or "").strip("'\"")
        if value == "False":
            return flags.get(f"no_{name}", match[0])
        if name not in flags:
            return match[0]
        told = value not in ("", "...", "True") and value[0] not in "[{"
        return f"{flags[name]} {value}" if told else flags[name]

    def translated(text: str) -> str:
        for words, (name, example) in _BESIDE.items():
            if name in flags:
                text = text.replace(words, f"{words}, such as {flags[name]} {example}")
        text = _OPTION.sub(option, text)
        return _NAME.sub(lambda m: flags.get(m[0].removeprefix("fuse."), m[0]), text)

    # A place may be a line of the user's program, which stays as it is.
    where = flags.get(error.where.rstrip("="), error.where)
    what, why, how = (translated(text) for text in (error.what, error.why, error.how))
    return FxfuseError(what, where=where, why=why, how=how)


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
