"""`fxfuse fuse`: several checkpoints become one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, cast

import typer
from torch import nn

import fxfuse
from fxfuse import budget as budgets
from fxfuse import label_spaces
from fxfuse import plan as plans
from fxfuse.checkpoint import write_state_dict
from fxfuse.cli.load import load_members, load_template
from fxfuse.cli.options import (
    Budget,
    Checkpoints,
    Classes,
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
from fxfuse.cli.show import checks_json, checks_markdown, checks_table, err, out, print_json
from fxfuse.members import check_enough
from fxfuse.output import atomic_folder, check_output
from fxfuse.report import write_report
from fxfuse.zoo import make_inputs

WEIGHTS, PLAN, SUMMARY = "fused.safetensors", "plan.json", "summary.md"
REPORT = "report.html"
FILES = (WEIGHTS, PLAN, SUMMARY, REPORT)

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
CalibrationFile = Annotated[
    Path | None,
    typer.Option(
        "--calibration",
        help="`.safetensors` or `.pt` file with 100 to 1,000 unlabelled inputs, [n, ...].",
        metavar="FILE",
    ),
]
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
        help="For `transplant`, `iterative` or `hierarchical`: fuse in steps instead of all at "
        "once."
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
Force = Annotated[bool, typer.Option("--force", help="Replace the folder of an earlier run.")]
NoVerify = Annotated[bool, typer.Option("--no-verify", help="Skip the oracles.")]


def _read_text(path: Path) -> str:
    """The text of a file; what is no text in it is a fault of its content."""
    return path.read_text(encoding="utf-8", errors="replace")


def fuse(
    checkpoints: Checkpoints,
    model: Model,
    input: Input,
    out_folder: Annotated[Path, typer.Option("--out", help="Folder to write.", metavar="FOLDER")],
    model_arg: ModelArg = None,
    member_arg: MemberArg = None,
    method: Method = "transplant",
    score: Score = None,
    variant: Variant = None,
    fraction: Fraction = None,
    reference: Reference = "0",
    calibration: CalibrationFile = None,
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
    report: Report = False,
    force: Force = False,
    no_verify: NoVerify = False,
    json: Json = False,
) -> None:
    """Fuse trained networks of one architecture into one network."""
    check_output(out_folder, FILES, force=force)
    members: Sequence[nn.Module | Path] = checkpoints
    template = None
    # What runs the members, or lets them differ, needs them in memory; the rest reads their files.
    if calibration or refit or method == "auto" or heads or classes or member_arg:
        members, inputs = load_members(model, model_arg, input, checkpoints, member_arg)
    else:
        check_enough(checkpoints, "fusion")
        template, inputs = load_template(model, model_arg, input, checkpoints[0])
    with err.status(f"fusing {len(members)} networks"):
        result = fxfuse.fuse(
            members,
            inputs,
            template=template,
            method=method,
            score=score,
            variant=variant,
            fraction=parse_by_group("--fraction", fraction or ()),
            reference=parse_reference(reference),
            calibration=None if calibration is None else make_inputs(str(calibration)),
            refit=refit,
            outputs=outputs,
            steps=steps,
            seconds=seconds,
            width=parse_by_group("--width", width or ()),
            max_params=max_params,
            max_flops=max_flops,
            round_to=round_to,
            # What is no budget and no way of mixing, fuse refuses by name.
            budget=cast("budgets.Budget", budget),
            mixing=cast("plans.Mixing | None", mixing),
            plan=None if plan is None else plans.FusionPlan.from_json(_read_text(plan)),
            freeze=freeze or (),
            share=share or (),
            ignore=ignore or (),
            output_dims=parse_output_dims(output_dims or ()),
            heads=parse_heads(heads or ()),
            # So it does with what is no way of handing out heads.
            head_outputs=cast("label_spaces.HeadOutputs | None", head_outputs),
            classes=read_classes(classes),
            verify=not no_verify,
        )
    checks = result.verification.checks
    with atomic_folder(out_folder, FILES, force=force) as folder:
        write_state_dict(folder / WEIGHTS, result.state_dict())
        (folder / PLAN).write_text(result.plan.to_json(), encoding="utf-8")
        told = f"\nMatched to the ensemble: {result.choice}.\n" if result.choice else ""
        summary = f"{result.plan.summary()}{told}\n{checks_markdown(checks)}"
        (folder / SUMMARY).write_text(summary, encoding="utf-8")
        if report:
            write_report(result, folder / REPORT, title=f"{len(members)} networks fused into one")
    if json:
        print_json(
            {
                "out": str(out_folder),
                "files": FILES if report else FILES[:-1],
                "verification": checks_json(checks),
                "choice": asdict(result.choice) if result.choice else None,
                "sizes": result.plan.sizes(),
                "refused": dict(result.plan.refused),
                "classes": list(result.classes),
            }
        )
        return
    if checks:
        out.print(checks_table(checks))
    if result.choice:
        out.print(str(result.choice), markup=False)
    for name, why in result.plan.refused.items():
        out.print(f"{name} keeps the size that it has in one network: {why}", markup=False)
    out.print(f"{len(members)} networks fused into one, written to {out_folder}", markup=False)
