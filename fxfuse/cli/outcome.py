"""What a command says about a fused network that it has written."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from fxfuse.cli.model_names import is_named
from fxfuse.cli.recipe import Outcome, Recipe, run
from fxfuse.cli.recipe.run import PRETRAINED
from fxfuse.cli.report.content import Network, measures
from fxfuse.cli.show import checks_json, checks_table, out, print_json, table, working

_MILLION = 1e6


def carry_out(recipe: Recipe, folder: Path | None, *, force: bool, json: bool) -> None:
    """Run a recipe and print what came out.

    `folder` is how its folder is called in what is printed; None: as seen from here.
    """
    with working() as (stage, progress):
        outcome = run(recipe, force=force, stage=stage, progress=progress)
    _show(outcome, folder or Path(os.path.relpath(outcome.folder)), json=json)


def _show(outcome: Outcome, folder: Path, *, json: bool) -> None:
    """Print what running a recipe gave."""
    result = outcome.result
    checks, plan = result.verification.checks, result.plan
    if json:
        print_json(
            {
                "out": str(folder),
                "files": outcome.files,
                "verification": checks_json(checks),
                "raw": bool(outcome.raw_note),
                "likeness": outcome.likeness.as_json() if outcome.likeness else None,
                "history": result.history.as_json() if result.history else None,
                "trained": outcome.trained,
                "networks": [network.as_json() for network in outcome.networks],
                "unsaved": outcome.unsaved,
                "sizes": plan.sizes(),
                "kept_sizes": plan.kept_sizes,
                "classes": list(result.classes),
            }
        )
        return
    if checks:
        out.print(checks_table(checks))
    if result.refit:
        out.print(f"refit: {result.refit}", markup=False)
    if result.history:
        columns = result.history.table()
        rows = zip(*columns.values(), strict=True)
        out.print(table(result.history.described()[0], tuple(columns), tuple(rows)))
        out.print(f"task: {result.history.task}, {result.history.why}", markup=False)
    if outcome.trained:
        out.print(outcome.trained, markup=False)
    for name, why in plan.kept_sizes.items():
        out.print(f"{name} keeps the size that it has in one network: {why}", markup=False)
    if outcome.networks:
        out.print(networks_table(outcome.networks))
    raw = ", raw (not refitted)" * bool(outcome.raw_note)
    out.print(f"{outcome.recipe.title}{raw}, written to {folder}", markup=False)
    if outcome.unsaved:
        said = f"there is no folder for transformers beside it: {outcome.unsaved}"
        out.print(said, style="yellow", markup=False)
    elif PRETRAINED in outcome.files:
        out.print(f"for transformers, with a model card: {folder / PRETRAINED}", markup=False)
    if outcome.raw_note:
        out.print(outcome.raw_note, style="yellow", markup=False)
        if outcome.likeness:
            out.print(str(outcome.likeness), style="yellow", markup=False, highlight=False)
        model = outcome.recipe.model
        own = "" if is_named(model) else f"--model {model} "
        options = f"{own}--calibration DATA --refine refit,match --out FOLDER"
        refine = f"fxfuse refit {folder} {options}"
        out.print(f"next: {refine}, or --calibration DATA from the beginning", markup=False)


def networks_table(networks: Sequence[Network]) -> Table:
    """Put networks beside each other; a column in which nothing was measured is left out."""
    columns: dict[str, list[Any]] = {
        "network": [n.name for n in networks],
        **measures(networks),
        "parameters": [f"{n.parameters:,}" for n in networks],
        "MFLOPs": [_cell(n.flops, 3, 1 / _MILLION) for n in networks],
        "latency, ms": [_cell(n.milliseconds, 3) for n in networks],
    }
    shown = {title: cells for title, cells in columns.items() if any(c is not None for c in cells)}
    lines = zip(*shown.values(), strict=True)
    rows = [["–" if cell is None else cell for cell in line] for line in lines]
    return table("Networks", tuple(shown), rows)


def _cell(value: float | None, digits: int, unit: float = 1.0) -> str | None:
    return None if value is None else f"{value * unit:,.{digits}f}"
