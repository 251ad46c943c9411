"""`fxfuse fuse`: several checkpoints become one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from fxfuse.cli.flags import (
    CALIBRATION,
    CHECKPOINTS,
    CONSTRAINTS,
    HEADS,
    IMAGES,
    MATCH,
    METHOD,
    REFIT,
    SIZE,
    TASK,
    Given,
    takes,
)
from fxfuse.cli.load import asked_recipe
from fxfuse.cli.options import (
    EXPERT,
    Checkpoints,
    EvaluationSpec,
    Force,
    Input,
    Json,
    MemberArg,
    Model,
    ModelArg,
    NoVerify,
    OptionalCalibration,
    OutFolder,
    Report,
    Text,
    calibration_source,
)
from fxfuse.cli.outcome import carry_out
from fxfuse.errors import OptionError
from fxfuse.graph.module_checks import check_enough

PlanFile = Annotated[
    Path | None,
    typer.Option(
        "--plan",
        help="`plan.json` of an earlier fusion of these members, which is applied again in place "
        "of a method, a size, constraints and heads.",
        metavar="FILE",
        rich_help_panel=EXPERT,
    ),
]


@takes(CHECKPOINTS, METHOD, SIZE, CALIBRATION, IMAGES, TASK, REFIT, MATCH, CONSTRAINTS, HEADS)
def fuse(
    checkpoints: Checkpoints,
    model: Model,
    input: Input,
    out: OutFolder,
    model_arg: ModelArg = None,
    member_arg: MemberArg = None,
    calibration: OptionalCalibration = None,
    text: Text = None,
    *,
    given: Given,
    plan: PlanFile = None,
    data: EvaluationSpec = None,
    report: Report = False,
    no_verify: NoVerify = False,
    force: Force = False,
    json: Json = False,
) -> None:
    """Fuse trained networks of one architecture into one network.

    With --calibration every step follows: units are selected by what the members answer, every
    layer is refitted, and the closest start is matched to the ensemble. Without it the result is a
    raw transplant, most likely at chance level.
    """
    check_enough(checkpoints, "fusion")
    planned = given.names(METHOD, SIZE, CONSTRAINTS, HEADS)
    if plan is not None and planned:
        raise OptionError(
            f"--plan and {', '.join(planned)} contradict each other",
            why="a plan holds the method, the size, the constraints and the heads",
            how="leave one of them out",
        )
    inputs, evaluation = given.sources(calibration_source(calibration, text), data)
    recipe = asked_recipe(
        model,
        model_arg,
        input,
        checkpoints,
        member_arg,
        given.options(CHECKPOINTS),
        fuse={
            **given.recipe(),
            "plan": None if plan is None else os.fspath(plan),
            "verify": not no_verify,
        },
        calibration=inputs,
        evaluation=evaluation,
        output={"folder": os.fspath(out), "report": report},
    )
    carry_out(recipe, out, force=force, json=json)
