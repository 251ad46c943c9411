"""The command line: parse, call, show. All logic lives below this package."""

from __future__ import annotations

import sys

__all__ = ["main"]

#: What the extra `cli` installs, as it is imported.
_EXTRA = ("typer", "rich", "pydantic", "pydantic_core", "yaml", "jinja2")


def main() -> None:
    """Entry point of the `fxfuse` script."""
    try:
        from fxfuse.cli.app import main as run
    except ModuleNotFoundError as error:
        if error.name not in _EXTRA:
            raise
        sys.exit(_without(error.name))
    run()


def _without(name: str) -> int:
    print(
        f"error: the command line needs {name}, which is not installed\n"
        "  how to fix: pip install 'fxfuse[cli]'",
        file=sys.stderr,
    )
    return 2
