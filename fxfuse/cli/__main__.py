"""`python -m fxfuse.cli`."""

from __future__ import annotations

from fxfuse.cli.app import main

main()
