"""The command line: parse, call, show. All logic lives below this package."""

from __future__ import annotations

from fxfuse.cli.app import main

__all__ = ["main"]
