"""Writing a report, whole or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from torch import nn

from fxfuse.api.result import FusionResult
from fxfuse.cli.report.content import Network, gather
from fxfuse.common.output import write_text
from fxfuse.errors import MissingDependencyError


def write_report(
    result: FusionResult,
    path: str | Path,
    *,
    title: str = "Fusion report",
    members: Sequence[nn.Module] | None = None,
    networks: Sequence[Network] = (),
    sweep: Sequence[Network] = (),
    refined: bool = False,
    names: Sequence[str] = (),
    next_step: str = "",
) -> None:
    """Write what a fusion did as one HTML file, which needs no other file and no network.

    Args:
        result: What `fuse` or `prune` returned.
        path: The file; an existing one is replaced.
        title: Of the page.
        members: The members, so that the scores of what was lost are known, where the score needs
            no data.
        networks: Rows of the table, measured by the caller; none: the sizes of a member, of the
            ensemble and of the fused network.
        sweep: Networks of other widths with their accuracies, for a curve against operations.
        refined: Whether the network was fitted or trained after it was fused, elsewhere.
        names: What the members are called, such as the names of their files; none: numbers.
        next_step: What the reader should do next; "": what follows from the rest.

    Raises:
        MissingDependencyError: altair or vl-convert-python is not installed.
    """
    check_installed()
    from fxfuse.cli.report.page import render

    content = gather(
        result,
        title=title,
        members=members,
        networks=networks,
        sweep=sweep,
        refined=refined,
        names=names,
        next_step=next_step,
    )
    write_text(path, render(content))


def check_installed() -> None:
    """Check that altair and vl-convert-python are installed, before the work of a report."""
    try:
        import_module("fxfuse.cli.report.page")
    except ImportError as error:
        raise MissingDependencyError(
            "a report needs altair and vl-convert-python",
            why=str(error),
            how='pip install "fxfuse[report]"',
        ) from error
