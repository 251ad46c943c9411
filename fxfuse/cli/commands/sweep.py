"""`fxfuse sweep`: the same fusion in several sizes, and what each is worth."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from fxfuse.cli.flags import (
    CALIBRATION,
    CHECKPOINTS,
    CONSTRAINTS,
    IMAGES,
    MATCH,
    METHOD,
    REFIT,
    SIZE,
    TASK,
    Given,
    takes,
)
from fxfuse.cli.forms import unreadable
from fxfuse.cli.load import asked_recipe
from fxfuse.cli.options import (
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
    Text,
    calibration_source,
)
from fxfuse.cli.outcome import networks_table
from fxfuse.cli.recipe import Outcome, run
from fxfuse.cli.recipe.summary import networks_text
from fxfuse.cli.report.content import Network, sizes_of
from fxfuse.cli.show import out as console
from fxfuse.cli.show import print_json, working
from fxfuse.common.output import MARK, check_replaceable, write_text
from fxfuse.errors import OptionError

Sizes = Annotated[
    str,
    typer.Option(
        "--sizes",
        help="Widths in units of a member, with commas between them.",
        metavar="NUMBER,NUMBER",
    ),
]
_TABLE, _CHART = "sweep.md", "sweep.svg"


@takes(CHECKPOINTS, METHOD, SIZE, CALIBRATION, IMAGES, TASK, REFIT, MATCH, CONSTRAINTS)
def sweep(
    checkpoints: Checkpoints,
    model: Model,
    input: Input,
    out: OutFolder,
    sizes: Sizes = "0.5,0.75,1",
    model_arg: ModelArg = None,
    member_arg: MemberArg = None,
    calibration: OptionalCalibration = None,
    text: Text = None,
    *,
    given: Given,
    data: EvaluationSpec = None,
    no_verify: NoVerify = False,
    force: Force = False,
    json: Json = False,
) -> None:
    """Fuse in several sizes, and write what each costs and how good it is.

    Each size is a result of its own, FOLDER/SIZE. FOLDER/sweep.md is the table, and sweep.svg the
    chart where the extra `report` is installed. One checkpoint alone is pruned.
    """
    widths = _read_sizes(sizes)
    if "width" in given.options(SIZE):
        raise OptionError("--width and --sizes contradict each other", how="leave --width out")
    for name in (_TABLE, _CHART):
        check_replaceable(out / name)
    inputs, evaluation = given.sources(calibration_source(calibration, text), data)
    asked = {**given.recipe(), "verify": not no_verify}
    rows: list[Network] = []
    others: Sequence[Network] = ()
    for width in widths:
        recipe = asked_recipe(
            model,
            model_arg,
            input,
            checkpoints,
            member_arg,
            given.options(CHECKPOINTS),
            fuse={**asked, "size": {**asked.get("size", {}), "width": width}},
            calibration=inputs,
            evaluation=evaluation,
            output={"folder": os.fspath(out / f"{width:g}")},
        )
        with working() as (stage, progress), stage(f"size {width:g}"):
            outcome = run(recipe, force=force, stage=stage, progress=progress)
        *others, own = _networks(outcome)
        rows.append(replace(own, name=f"size {width:g}"))
    table = networks_text([*others, *rows])
    write_text(out / _TABLE, f"{table}\n<!-- {MARK}. -->\n")
    drawn = _draw(rows, others, out / _CHART)
    if json:
        found = {"out": str(out), "sizes": widths, "chart": drawn}
        print_json({**found, "networks": [row.as_json() for row in (*others, *rows)]})
        return
    console.print(networks_table([*others, *rows]))
    console.print(f"{len(rows)} sizes, written to {out}", markup=False)


def _read_sizes(text: str) -> list[float]:
    try:
        found = [float(size) for size in text.split(",")]
        if not all(0 < size < math.inf for size in found):
            raise ValueError("a size is greater than 0")
    except ValueError as error:
        raise unreadable("--sizes", text, str(error), "write sizes, such as 0.5,0.75,1") from error
    return list(dict.fromkeys(found))


def _networks(outcome: Outcome) -> Sequence[Network]:
    """Return the members, the ensemble, and last the result: as measured, or as the judge saw."""
    if outcome.networks:
        return outcome.networks
    member, *others, own = sizes_of(outcome.result)
    history = outcome.result.history
    if history is None:
        return (member, *others, own)
    judged = [start.judged for start in history.starts if start.name.startswith("member ")]
    best = min((x for x in judged if not math.isnan(x)), default=None)
    known = replace(member, name="best member", distance=best, unit=history.unit)
    reached = history[history.chosen].judged
    return (known, *others, replace(own, distance=reached, unit=history.unit))


def _draw(rows: Sequence[Network], others: Sequence[Network], path: Path) -> bool:
    """Draw the sizes against what they cost; return whether there is a chart."""
    try:
        import vl_convert

        from fxfuse.cli.report.charts import sweep as chart
    except ImportError:
        return False
    spec = chart(rows, others)
    picture = vl_convert.vegalite_to_svg({**spec, "width": 480})
    write_text(path, f"{picture}\n<!-- {MARK}. -->\n")
    return True
