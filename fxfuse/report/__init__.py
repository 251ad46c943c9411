"""`report.html`: what a fusion did, as one self-contained page."""

from fxfuse.report.content import Network
from fxfuse.report.write import write_report

__all__ = ["Network", "write_report"]
