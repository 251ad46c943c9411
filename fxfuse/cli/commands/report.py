"""`fxfuse report`: a page about a fusion that was written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from fxfuse.cli.flags import IMAGES, Given, takes
from fxfuse.cli.options import EvaluationSpec, Folder, Json, OwnModel, Trust
from fxfuse.cli.recipe.compared import report_on
from fxfuse.cli.show import out as console
from fxfuse.cli.show import print_json, working
from fxfuse.cli.sources import absolute

Page = Annotated[
    Path | None,
    typer.Option("--out", help="The page; else report.html in the folder.", metavar="FILE"),
]


@takes(IMAGES)
def report(
    folder: Folder,
    out: Page = None,
    data: EvaluationSpec = None,
    *,
    given: Given,
    model: OwnModel = None,
    trust: Trust = False,
    json: Json = False,
) -> None:
    """Write a page that shows what a fusion did, and what came out on data."""
    with working() as (stage, _), stage("writing the report"):
        (source,) = given.sources(data and absolute(data))
        page = report_on(folder, source, out, model=model, trust=trust)
    if json:
        print_json({"out": str(page)})
        return
    console.print(f"written to {os.path.relpath(page)}", markup=False)
