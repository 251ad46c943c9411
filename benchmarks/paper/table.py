"""Write the experiments' tables into docs/paper.md, or check that they are up to date.

python -m benchmarks.paper.table           # rewrite docs/paper.md
python -m benchmarks.paper.table --check   # exit with 1 when it is out of date
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.pages import with_tables
from benchmarks.paper import (
    compare,
    cost,
    depth,
    fraction,
    members,
    order,
    resnet,
    selftransplant,
    sync_sgd,
    vit,
    width,
)
from benchmarks.paper.experiment import Experiment
from benchmarks.paper.markdown import markdown
from benchmarks.paper.runner import PLOTS, RESULTS, ROOT

EXPERIMENTS: tuple[Experiment, ...] = tuple(
    module.EXPERIMENT
    for module in (
        compare,
        resnet,
        vit,
        order,
        width,
        depth,
        members,
        selftransplant,
        sync_sgd,
        fraction,
        cost,
    )
)
PAGE = ROOT / "docs" / "paper.md"
MARK = "paper"


def tables(results: Path = RESULTS, plots: Path = PLOTS) -> str:
    """The sections of all experiments, in a fixed order.

    Args:
        results: The folder of the JSON files.
        plots: The folder of the SVG files, beside the page.
    """
    sections = []
    for experiment in EXPERIMENTS:
        path = results / f"{experiment.name}.json"
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        plot = plots / f"{experiment.name}.svg"
        sections.append(_section(experiment, found, plot if plot.exists() else None))
    return "\n".join(sections)


def _section(experiment: Experiment, found: dict[str, Any] | None, plot: Path | None) -> str:
    lines = [f"## {experiment.title}", "", experiment.about, ""]
    command = f"`python -m benchmarks.paper.{experiment.name}`"
    if found is None:
        return "\n".join([*lines, f"Not measured yet: {command}.", ""])
    options = found["options"]
    rates = " or ".join(f"{rate:g}" for rate in options["rates"])
    lines += [
        f"{command}; {options['seeds']} seeds, k = {options['steps']} steps, learning rate "
        f"{rates}, {options['calibration']} calibration inputs, "
        f"{found['cpu_seconds'] / 60:.1f} CPU minutes, torch {found['versions']['torch']}.",
        "",
        markdown(experiment, found),
        "",
    ]
    if plot is not None:
        lines += [f"![{experiment.title}]({plot.parent.name}/{plot.name})", ""]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Rewrite or check the page, and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit 1 if out of date"
    )
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--plots", type=Path, default=PLOTS)
    asked = parser.parse_args(arguments)
    page = asked.page.read_text(encoding="utf-8")
    wanted = with_tables(page, MARK, f"\n{tables(asked.results, asked.plots)}\n")
    if asked.check:
        if page != wanted:
            print(
                f"{asked.page.name} is out of date: run python -m benchmarks.paper.table",
                file=sys.stderr,
            )
        return int(page != wanted)
    asked.page.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
