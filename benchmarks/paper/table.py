"""Write the experiments' tables into their pages in docs/paper/, or check that they are up to date.

python -m benchmarks.paper.table           # rewrite docs/paper/*.md
python -m benchmarks.paper.table --check   # exit with 1 when one of them is out of date
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.pages import marks, update, with_tables
from benchmarks.paper import (
    capacity,
    compare,
    cost,
    depth,
    different,
    fraction,
    members,
    order,
    resnet,
    selftransplant,
    sparsity,
    sync_sgd,
    vit,
    width,
)
from benchmarks.paper.experiment import Experiment
from benchmarks.paper.markdown import markdown
from benchmarks.paper.runner import PAGES, RESULTS

EXPERIMENTS: tuple[Experiment, ...] = tuple(
    module.EXPERIMENT
    for module in (
        compare,
        resnet,
        vit,
        order,
        width,
        depth,
        different,
        members,
        sparsity,
        capacity,
        selftransplant,
        sync_sgd,
        fraction,
        cost,
    )
)
MARK = "paper"


def wanted(experiment: Experiment, results: Path, pages: Path) -> str:
    """An experiment's page with the tables that its results say; a page that is not there is begun.

    Args:
        experiment: Of which the page is.
        results: The folder of the JSON files.
        pages: The folder of the pages and the plots.
    """
    page = pages / f"{experiment.name}.md"
    begin, end = marks(MARK)
    text = f"# {experiment.title}\n\n{begin}\n{end}\n"
    if page.exists():
        text = page.read_text(encoding="utf-8")
    path = results / f"{experiment.name}.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    plot = pages / f"{experiment.name}.svg"
    return with_tables(text, MARK, _section(experiment, found, plot if plot.exists() else None))


def _section(experiment: Experiment, found: dict[str, Any] | None, plot: Path | None) -> str:
    if found is None:
        return f"\n{experiment.about}\n\nNot measured yet: `{_command(experiment, [])}`.\n\n"
    options = found["options"]
    rates = " or ".join(f"{rate:g}" for rate in options["rates"])
    rates += f" or beyond by factors of {options['beyond']:g}"
    lines = [
        "",
        experiment.about,
        "",
        f"`{_command(experiment, found['blocks'])}`; {options['seeds']} seeds, "
        f"k = {options['steps']} steps, learning rate {rates}, "
        f"{options['calibration']} calibration inputs, "
        f"{found['cpu_seconds'] / 60:.1f} CPU minutes, torch {found['versions']['torch']}.",
        "",
    ]
    if plot is not None:
        lines += [f"![{experiment.title}]({plot.name})", ""]
    return "\n".join([*lines, markdown(experiment, found), "", ""])


def _command(experiment: Experiment, blocks: list[dict[str, Any]]) -> str:
    """The command that measured the blocks, with what it was told other than the defaults."""
    networks = tuple(dict.fromkeys(block["network"] for block in blocks))
    ns = tuple(dict.fromkeys(block["n"] for block in blocks if block["n"] is not None))
    command = f"python -m benchmarks.paper.{experiment.name}"
    if blocks and networks != experiment.networks:
        command += f" --network {' '.join(networks)}"
    if ns and ns != experiment.ns:
        command += f" -n {' '.join(map(str, ns))}"
    return command


def main(arguments: list[str] | None = None) -> int:
    """Rewrite or check the pages, and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit 1 if out of date"
    )
    parser.add_argument("--pages", type=Path, default=PAGES)
    parser.add_argument("--results", type=Path, default=RESULTS)
    asked = parser.parse_args(arguments)
    texts = {
        asked.pages / f"{experiment.name}.md": wanted(experiment, asked.results, asked.pages)
        for experiment in EXPERIMENTS
    }
    return update(texts, "python -m benchmarks.paper.table", check=asked.check)


if __name__ == "__main__":
    sys.exit(main())
