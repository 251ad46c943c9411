"""`fxfuse demo`: the main job on real data, with tables at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress

from fxfuse.cli.show import err, out
from fxfuse.common.output import write_json

Seeds = Annotated[int, typer.Option(min=1, help="Repetitions, each with its own members.")]
Steps = Annotated[int, typer.Option(min=1, help="Steps of matching, fine-tuning, distillation.")]
MemberSteps = Annotated[int, typer.Option(min=1, help="Steps that each member is trained for.")]
NoCompile = Annotated[
    bool, typer.Option("--no-compile", help="Do not measure latency under torch.compile.")
]
JsonFile = Annotated[
    Path | None,
    typer.Option("--json", help="Also write the numbers to this file.", metavar="FILE"),
]


def demo(
    seeds: Seeds = 1,
    steps: Steps = 100,
    member_steps: MemberSteps = 150,
    no_compile: NoCompile = False,
    json: JsonFile = None,
) -> None:
    """Train four small networks on real images, fuse them, and compare."""
    # Here, since it brings torch.utils.benchmark, which no other command should wait for.
    from fxfuse.cli.demo import run_demo, to_rich

    if json is not None and not json.absolute().parent.is_dir():
        raise typer.BadParameter(f"there is no folder {json.absolute().parent}")
    with Progress(console=err) as progress:
        results = run_demo(
            seeds=range(seeds),
            steps=steps,
            member_steps=member_steps,
            progress=progress,
            compile_latency=not no_compile,
        )
    if json is not None:
        write_json(json, results)
    for table in to_rich(results):
        out.print(table)
