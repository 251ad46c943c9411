"""`python -m fxfuse`."""

from fxfuse.cli import main

# The demo's processes read this file again.
if __name__ == "__main__":
    main()
