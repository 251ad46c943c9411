"""`fxfuse compare`: what has been written, beside the members and their ensemble."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from fxfuse.cli.options import EvaluationSpec, Folders, Json
from fxfuse.cli.outcome import networks_table
from fxfuse.cli.recipe.compared import compared
from fxfuse.cli.show import out, print_json, working

NoLatency = Annotated[bool, typer.Option("--no-latency", help="Do not measure latency.")]


def compare(
    folders: Folders, data: EvaluationSpec = None, no_latency: NoLatency = False, json: Json = False
) -> None:
    """Compare fused networks with their members and the ensemble, on the same data."""
    with working() as (stage, _), stage("measuring"):
        rows = compared(folders, data, latency=not no_latency)
    if json:
        print_json([asdict(row) for row in rows])
    else:
        out.print(networks_table(rows))
