"""`report.html`: what a fusion did, as one self-contained page."""

from fxfuse.cli.report.content import Network
from fxfuse.cli.report.write import write_report

__all__ = ["Network", "write_report"]
