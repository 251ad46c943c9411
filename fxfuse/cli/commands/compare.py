"""`fxfuse compare`: what has been written, beside the members and their ensemble."""

from __future__ import annotations

from typing import Annotated

import typer

from fxfuse.cli.flags import IMAGES, TASK, Given, takes
from fxfuse.cli.options import EvaluationSpec, Folders, Json, OwnModel, Trust
from fxfuse.cli.outcome import networks_table
from fxfuse.cli.recipe.compared import compared
from fxfuse.cli.show import out, print_json, working
from fxfuse.cli.sources import absolute

Dtype = Annotated[
    str | None,
    typer.Option(
        help="Compare each network computed in this precision, too, such as `bfloat16`.",
        metavar="DTYPE",
    ),
]
Quantize = Annotated[
    str | None,
    typer.Option(
        help="Compare each network with linear layers in eight bits, too: `int8` (weights) or "
        "`int8_dynamic` (activations as well). Needs torchao.",
        metavar="KIND",
    ),
]
NoLatency = Annotated[bool, typer.Option("--no-latency", help="Do not measure latency.")]


@takes(IMAGES, TASK)
def compare(
    folders: Folders,
    data: EvaluationSpec = None,
    *,
    given: Given,
    dtype: Dtype = None,
    quantize: Quantize = None,
    no_latency: NoLatency = False,
    model: OwnModel = None,
    trust: Trust = False,
    json: Json = False,
) -> None:
    """Compare fused networks with their members and the ensemble, on the same data."""
    task = given.make(TASK) if given.names(TASK) else None
    with working() as (stage, _), stage("measuring"):
        (source,) = given.sources(data and absolute(data))
        rows = compared(
            folders,
            source,
            task,
            dtype=dtype,
            quantize=quantize,
            latency=not no_latency,
            model=model,
            trust=trust,
        )
    if json:
        print_json([row.as_json() for row in rows])
    else:
        out.print(networks_table(rows))
