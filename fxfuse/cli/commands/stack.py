"""`fxfuse stack`: the ensemble itself as one graph, without any approximation."""

from __future__ import annotations

from typing import Annotated

import typer

import fxfuse
from fxfuse.api.saved import FILES, GRAPH, WEIGHTS, save
from fxfuse.cli.flags import CHECKPOINTS, Given, takes
from fxfuse.cli.load import load_members
from fxfuse.cli.options import (
    Checkpoints,
    Force,
    Input,
    Json,
    MemberArg,
    Model,
    ModelArg,
    OutFolder,
)
from fxfuse.cli.show import out as console
from fxfuse.cli.show import print_json, working
from fxfuse.common.output import check_output

Reduce = Annotated[
    str,
    typer.Option(
        help="`mean` of the outputs, `probabilities` (mean of the softmax of logits along the last "
        "dimension), `none` (one by one), or `vote` of the classes."
    ),
]


@takes(CHECKPOINTS)
def stack(
    checkpoints: Checkpoints,
    model: Model,
    input: Input,
    out: OutFolder,
    *,
    given: Given,
    model_arg: ModelArg = None,
    member_arg: MemberArg = None,
    reduce: Reduce = "mean",
    force: Force = False,
    json: Json = False,
) -> None:
    """Write the ensemble as one graph that answers exactly as its members do."""
    check_output(out, FILES, force=force)
    with working() as (stage, _):
        with stage("reading networks"):
            members, inputs = load_members(
                model,
                model_arg,
                input,
                checkpoints,
                given.make(CHECKPOINTS).weights,
                member_arg,
            )
        with stage(f"stacking {len(members)} networks"):
            stacked = fxfuse.stack(members, inputs, reduce=reduce)
        with stage("writing"):
            save(stacked, out, inputs, force=force)
    if json:
        print_json({"out": str(out), "files": [WEIGHTS, GRAPH], "members": len(members)})
        return
    console.print(f"{len(members)} networks side by side, written to {out}", markup=False)
