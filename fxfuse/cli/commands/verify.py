"""`fxfuse verify`: the oracles, on a network of the user's."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated

import typer

from fxfuse import verify as oracles
from fxfuse.cli.flags import CHECKPOINTS, CONSTRAINTS, Given, takes
from fxfuse.cli.load import load_members, load_model
from fxfuse.cli.options import Input, Json, Model, ModelArg
from fxfuse.cli.show import checks_json, checks_table, err, out, print_json
from fxfuse.graph.capture import capture

OptionalCheckpoints = Annotated[
    list[Path] | None,
    typer.Argument(
        help="Weights to verify with. Without any, the factory's own; with two or more, the "
        "ensemble is verified too.",
        metavar="CHECKPOINT",
        show_default=False,
    ),
]


@takes(CHECKPOINTS, CONSTRAINTS)
def verify(
    model: Model,
    input: Input,
    given: Given,
    checkpoints: OptionalCheckpoints = None,
    model_arg: ModelArg = None,
    json: Json = False,
) -> None:
    """Check that fxfuse understands a network: run its oracles, exit 1 if one fails."""
    constraints = given.make(CONSTRAINTS)
    if checkpoints:
        members, inputs = load_members(
            model, model_arg, input, checkpoints, given.make(CHECKPOINTS).weights
        )
    else:
        network, inputs = load_model(model, model_arg, input)
        members = [network]
    with err.status("capturing"):
        programs = [capture(member, inputs) for member in members]
    with err.status("permuting every coupling group"):
        checks = [oracles.permutation(programs[0], constraints=constraints)]
    refusals = [program.refusal for program in programs if not program.is_exported]
    if len(programs) > 1 and refusals:
        warnings.warn(
            f"wide equals ensemble: not run, because torch.export rejected the network: "
            f"{refusals[0]}",
            stacklevel=1,
        )
    elif len(programs) > 1:
        with err.status("comparing the wide network with the ensemble"):
            checks.append(
                oracles.concatenation_equals_ensemble(
                    programs, mixing="per_member", constraints=constraints
                )
            )
    if json:
        print_json(checks_json(checks))
    else:
        out.print(checks_table(checks))
        for check in checks:
            if check.detail:
                out.print(f"{check.name}: {check.detail}", markup=False)
    if not all(check.passed for check in checks):
        raise typer.Exit(1)
