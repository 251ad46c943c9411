"""`fxfuse fuse`: several checkpoints become one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from fxfuse.cli.load import asked_recipe
from fxfuse.cli.options import (
    Budget,
    CalibrationCopies,
    CalibrationLimit,
    CalibrationSpec,
    Checkpoints,
    Classes,
    EvaluationSpec,
    Force,
    Freeze,
    HeadOutputs,
    Heads,
    Ignore,
    Input,
    Json,
    MaxFlops,
    MaxParams,
    MemberArg,
    Model,
    ModelArg,
    OutFolder,
    OutputDims,
    RoundTo,
    Share,
    Widths,
    parse_by_group,
    parse_heads,
    parse_output_dims,
    parse_reference,
    read_classes,
)
from fxfuse.cli.outcome import carry_out

Method = Annotated[
    str,
    typer.Option(
        help="How units of the members are chosen and combined: `transplant`, `average` (index by "
        "index), `weight_matching` or `optimal_transport` (aligned, then averaged); with "
        "--calibration also `activation_matching`, `zip`, and `auto`: the closest of the refitted "
        "transplant and the members, matched to the ensemble."
    ),
]
Score = Annotated[
    str | None,
    typer.Option(
        help="How `transplant` measures importance: `l1`, `l2` (the default) or `bn_scale`; with "
        "--calibration also `activation` and `obs` (the default of `auto`)."
    ),
]
OptionalCalibration = Annotated[str | None, *CalibrationSpec.__metadata__]
Refit = Annotated[
    bool,
    typer.Option("--refit", help="Fit every layer to the members' activations, in closed form."),
]
Outputs = Annotated[
    str | None,
    typer.Option(
        help="What the network's output is, `logits` or `values`; else its shape decides."
    ),
]
Steps = Annotated[int | None, typer.Option(help="For `auto`: steps of matching.")]
Seconds = Annotated[float | None, typer.Option(help="For `auto`: CPU seconds of matching.")]
Fraction = Annotated[
    list[str] | None,
    typer.Option(
        help="For `transplant`: share of units that are not the first network's, as --width for "
        "all groups or by pattern; may be repeated.",
        metavar="SHARE|PATTERN=SHARE",
    ),
]
Reference = Annotated[
    str, typer.Option(help="Network that the others are aligned to, by number, or `mean`.")
]
Variant = Annotated[
    str | None,
    typer.Option(
        help="For `transplant`: `iterative` or `hierarchical` fuse in steps, not all at once; "
        "`components` merges residual streams (transformers), with --calibration and --refit."
    ),
]
PlanFile = Annotated[
    Path | None,
    typer.Option(
        "--plan",
        help="`plan.json` of an earlier fusion of these networks, to be applied again.",
        metavar="FILE",
    ),
]
Mixing = Annotated[
    str | None,
    typer.Option(
        help="How operators that mix networks (LayerNorm and the like) run: `joint`, or "
        "`per_member` where everything is kept, which is the default there."
    ),
]
Report = Annotated[
    bool,
    typer.Option("--report", help="Write `report.html` too: what was fused, as one page."),
]
NoVerify = Annotated[bool, typer.Option("--no-verify", help="Skip the oracles.")]


def fuse(
    checkpoints: Checkpoints,
    model: Model,
    input: Input,
    out_folder: OutFolder,
    model_arg: ModelArg = None,
    member_arg: MemberArg = None,
    method: Method = "transplant",
    score: Score = None,
    variant: Variant = None,
    fraction: Fraction = None,
    reference: Reference = "0",
    calibration: OptionalCalibration = None,
    calibration_limit: CalibrationLimit = 1000,
    calibration_copies: CalibrationCopies = 0,
    refit: Refit = False,
    outputs: Outputs = None,
    steps: Steps = None,
    seconds: Seconds = None,
    width: Widths = None,
    max_params: MaxParams = None,
    max_flops: MaxFlops = None,
    round_to: RoundTo = 1,
    budget: Budget = "local",
    mixing: Mixing = None,
    plan: PlanFile = None,
    freeze: Freeze = None,
    share: Share = None,
    ignore: Ignore = None,
    output_dims: OutputDims = None,
    heads: Heads = None,
    head_outputs: HeadOutputs = None,
    classes: Classes = None,
    data: EvaluationSpec = None,
    report: Report = False,
    force: Force = False,
    no_verify: NoVerify = False,
    json: Json = False,
) -> None:
    """Fuse trained networks of one architecture into one network."""
    asked = parse_heads(heads or ())
    options = {
        "method": method,
        "score": score,
        "variant": variant,
        "fraction": parse_by_group("--fraction", fraction or ()),
        "reference": parse_reference(reference),
        "calibration_limit": calibration_limit,
        "calibration_copies": calibration_copies,
        "refit": refit,
        "outputs": outputs,
        "steps": steps,
        "seconds": seconds,
        "width": parse_by_group("--width", width or ()),
        "max_params": max_params,
        "max_flops": max_flops,
        "round_to": round_to,
        "budget": budget,
        "mixing": mixing,
        "plan": None if plan is None else os.fspath(plan),
        "freeze": freeze or [],
        "share": share or [],
        "ignore": ignore or [],
        "output_dims": {o: list(dims) for o, dims in parse_output_dims(output_dims or ()).items()},
        "heads": asked if isinstance(asked, str) else list(asked),
        "head_outputs": head_outputs,
        "classes": read_classes(classes),
        "verify": not no_verify,
    }
    recipe = asked_recipe(
        model,
        model_arg,
        input,
        checkpoints,
        member_arg,
        fuse=options,
        calibration=calibration,
        evaluation=data,
        output={"folder": os.fspath(out_folder), "report": report},
    )
    carry_out(recipe, out_folder, force=force, json=json)
