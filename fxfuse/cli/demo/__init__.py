"""The demo: fuse four small residual networks trained on real images, and compare honestly."""

from fxfuse.cli.demo.run import run_demo
from fxfuse.cli.demo.table import to_markdown, to_rich

__all__ = ["run_demo", "to_markdown", "to_rich"]
