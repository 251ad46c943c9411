"""`fxfuse bench`: latency of what has been written, of a member and of the ensemble."""

from __future__ import annotations

from typing import Annotated

import typer

from fxfuse.cli.options import Folder, Json, OwnModel, Trust
from fxfuse.cli.recipe.compared import latencies
from fxfuse.cli.show import out, print_json, table, working

Batches = Annotated[
    list[int] | None, typer.Option("--batch", min=1, help="Batch size; may be repeated.")
]
Compiled = Annotated[
    bool, typer.Option("--compiled", help="Compile each network, too; takes a minute or more.")
]


def bench(
    folder: Folder,
    batch: Batches = None,
    compiled: Compiled = False,
    model: OwnModel = None,
    trust: Trust = False,
    json: Json = False,
) -> None:
    """Time a fused network beside one of its members and the ensemble."""
    with working() as (stage, _):
        rows = latencies(
            folder, batch or [1, 8], compiled=compiled, stage=stage, model=model, trust=trust
        )
    if json:
        print_json(rows)
        return
    columns = ("network", "batch", "how", "latency, ms", "of one member")
    lines = [tuple(row.values()) for row in rows]
    out.print(table("Latency, median", columns, lines))
