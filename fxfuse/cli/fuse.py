"""`fxfuse fuse`: several checkpoints become one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import fxfuse
from fxfuse.checkpoint import write_state_dict
from fxfuse.cli.load import load_members
from fxfuse.cli.options import (
    Checkpoints,
    Freeze,
    Ignore,
    Input,
    Json,
    Model,
    ModelArg,
    OutputDims,
    Share,
    parse_output_dims,
)
from fxfuse.cli.show import checks_json, checks_markdown, checks_table, err, out, print_json
from fxfuse.output import atomic_folder, check_output

WEIGHTS, PLAN, SUMMARY = "fused.safetensors", "plan.json", "summary.md"
FILES = (WEIGHTS, PLAN, SUMMARY)

Method = Annotated[
    str,
    typer.Option(
        help="How units of the members are chosen and combined: `transplant`, `average` (index by "
        "index), `weight_matching` or `optimal_transport` (aligned, then averaged)."
    ),
]
Score = Annotated[
    str,
    typer.Option(help="How `transplant` measures importance: `l1`, `l2` or `bn_scale`."),
]
Variant = Annotated[
    str | None,
    typer.Option(
        help="For `transplant`, `iterative` or `hierarchical`: fuse in steps instead of all at "
        "once."
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Replace the folder of an earlier run.")]
NoVerify = Annotated[bool, typer.Option("--no-verify", help="Skip the oracles.")]


def fuse(
    checkpoints: Checkpoints,
    model: Model,
    input: Input,
    out_folder: Annotated[Path, typer.Option("--out", help="Folder to write.", metavar="FOLDER")],
    model_arg: ModelArg = None,
    method: Method = "transplant",
    score: Score = "l2",
    variant: Variant = None,
    freeze: Freeze = None,
    share: Share = None,
    ignore: Ignore = None,
    output_dims: OutputDims = None,
    force: Force = False,
    no_verify: NoVerify = False,
    json: Json = False,
) -> None:
    """Fuse trained networks of one architecture into one network."""
    check_output(out_folder, FILES, force=force)
    members, inputs = load_members(model, model_arg, input, checkpoints)
    with err.status(f"fusing {len(members)} networks"):
        result = fxfuse.fuse(
            members,
            inputs,
            method=method,
            score=score,
            variant=variant,
            freeze=freeze or (),
            share=share or (),
            ignore=ignore or (),
            output_dims=parse_output_dims(output_dims or ()),
            verify=not no_verify,
        )
    checks = result.verification.checks
    with atomic_folder(out_folder, FILES, force=force) as folder:
        write_state_dict(folder / WEIGHTS, result.state_dict())
        (folder / PLAN).write_text(result.plan.to_json(), encoding="utf-8")
        summary = f"{result.plan.summary()}\n{checks_markdown(checks)}"
        (folder / SUMMARY).write_text(summary, encoding="utf-8")
    if json:
        print_json({"out": str(out_folder), "files": FILES, "verification": checks_json(checks)})
        return
    if checks:
        out.print(checks_table(checks))
    out.print(f"{len(members)} networks fused into one, written to {out_folder}", markup=False)
