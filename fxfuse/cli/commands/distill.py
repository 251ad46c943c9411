"""`fxfuse distill`: a fusion that was written, trained further."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from fxfuse.cli.options import DataSpec, Folder, Force, Json, OutFolder
from fxfuse.cli.outcome import carry_out
from fxfuse.cli.recipe import changed, read_recipe
from fxfuse.cli.sources import absolute

Kind = Annotated[
    str,
    typer.Option(
        help="`match` (mean squared difference of the logits), `distill` (KL from the softened "
        "ensemble), or `finetune` (labels)."
    ),
]
Steps = Annotated[int | None, typer.Option(help="Steps; 300 if no budget is given.")]
Seconds = Annotated[float | None, typer.Option(help="For `match`: CPU seconds in place of steps.")]
Rate = Annotated[float | None, typer.Option(help="Its highest learning rate.")]
Temperature = Annotated[float, typer.Option(help="For `distill`.")]


def distill(
    folder: Folder,
    out: OutFolder,
    data: DataSpec,
    kind: Kind = "match",
    steps: Steps = None,
    seconds: Seconds = None,
    learning_rate: Rate = None,
    temperature: Temperature = 4.0,
    force: Force = False,
    json: Json = False,
) -> None:
    """Make a fusion again, and train it to answer like its members' ensemble."""
    recipe = read_recipe(folder)
    asked = changed(
        recipe,
        train={
            "kind": kind,
            "steps": steps,
            "seconds": seconds,
            "learning_rate": learning_rate,
            "temperature": temperature,
            "data": absolute(data),
        },
        output={"folder": os.path.abspath(out), "report": recipe.output.report},
    )
    carry_out(asked, out, force=force, json=json)
