"""Whether `Size(latency=...)` is met: networks pruned to shares of their own latency.

    python -m benchmarks.latency
    python -m benchmarks.latency --table   # write the table of docs/how-to/choose-a-width.md

Nothing is trained: a latency depends on shapes only. It is measured again after the search, in
turns with that of the whole network. On one thread it is CPU time, which other processes change
through caches and clock rates. So a search counts only if the whole network took as long before as
after it, within 5 %, and is repeated up to 10 times; the JSON holds the whole network's times.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fxfuse
from benchmarks import records
from benchmarks.pages import update, with_tables
from fxfuse import Size
from fxfuse.transform import cost
from fxfuse.transform.cost import latency_of

RESULTS = Path(__file__).resolve().parent / "results" / "latency.json"
PAGE = Path(__file__).resolve().parents[1] / "docs" / "how-to" / "choose-a-width.md"
SHARES, REPEATS = (0.75, 0.5, 0.25), 3
TRIES, STEADY = 10, 0.05


def programs() -> dict[str, fxfuse.Program]:
    """A perceptron and a convolutional network."""
    torch.manual_seed(0)
    perceptron = nn.Sequential(
        *(nn.Linear(256, 512), nn.ReLU()),
        *(nn.Linear(512, 512), nn.ReLU()),
        nn.Linear(512, 10),
    )
    convolutions = nn.Sequential(
        *(nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)),
    )
    return {
        "perceptron, batch 64": fxfuse.capture(perceptron.eval(), torch.randn(64, 256)),
        "2 convolutions, batch 8": fxfuse.capture(convolutions.eval(), torch.randn(8, 3, 32, 32)),
    }


def measure(name: str, program: fxfuse.Program) -> Iterator[dict[str, Any]]:
    """Yield a row for each share of the network's own latency, and each allocation."""
    for share, kind in itertools.product(SHARES, ("uniform", "auto")):
        found: list[dict[str, Any]] = []
        while len(found) < TRIES and not (found and found[-1]["drift"] <= STEADY):
            found.append(_row(program, share, kind))
        row = min(found, key=lambda row: float(row["drift"]))
        yield {"network": name, "allocation": kind, **row, "tries": len(found)}


def _row(program: fxfuse.Program, share: float, kind: Any) -> dict[str, Any]:
    # Each search times everything itself.
    cost._OPERATORS.clear()
    cost._NETWORKS.clear()
    (whole,) = _milliseconds(program, program.module)
    start, target = time.process_time(), share * whole
    result = fxfuse.prune(program, size=Size(latency=target, allocation=kind), verify=False)
    took = time.process_time() - start
    again, pruned = _milliseconds(program, program.module, result.module)
    return {
        "share": share,
        "target, ms": target,
        "told, ms": result.latency,
        "measured, ms": pruned,
        "whole before and after, ms": [whole, again],
        "drift": abs(again / whole - 1),
        "parameters": sum(p.numel() for p in result.module.parameters()),
        "CPU seconds": round(took, 1),
        "sizes": dict(result.plan.sizes()),
    }


def _milliseconds(program: fxfuse.Program, *modules: nn.Module) -> list[float]:
    """The median of several medians for each network, measured in turns."""
    found = [[latency_of(module, program, None) for module in modules] for _ in range(REPEATS)]
    return [statistics.median(each) for each in zip(*found, strict=True)]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows in Markdown."""
    lines = [
        "| network | allocation | share | target, ms | measured, ms | off by | CPU s |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        asked, found = row["target, ms"], row["measured, ms"]
        cells = [row["network"], row["allocation"], f"{row['share']:g}", f"{asked:.2f}"]
        cells += [f"{found:.2f}", f"{found / asked - 1:+.0%}", f"{row['CPU seconds']:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", action="store_true", help="measure nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = records.earlier(RESULTS, "rows", keep=options.table)
    if not options.table:
        for name, program in programs().items():
            records.add(RESULTS, rows, measure(name, program))
    page = with_tables(PAGE.read_text(encoding="utf-8"), "latency", table(rows))
    update({PAGE: page}, "python -m benchmarks.latency --table", check=False)


if __name__ == "__main__":
    main()
