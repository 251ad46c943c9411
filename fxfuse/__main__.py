"""`python -m fxfuse`."""

from fxfuse.cli import main

main()
