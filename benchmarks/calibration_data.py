"""How many calibration inputs a refit needs, and of which kind: specialists on 5,000 MNIST images.

    python -m benchmarks.calibration_data             # measure (CPU minutes), write JSON and tables
    python -m benchmarks.calibration_data --check     # exit with 1 when the page is out of date

Two specialists are fused by `obs` and refitted from what each row says, and then matched to the
ensemble for 100 steps on the same inputs. Nothing sees a label; test data reports. The tables stand
in docs/how-to/choose-calibration-data.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional

import fxfuse
from benchmarks.pages import update, with_tables
from benchmarks.paper.datasets import load
from benchmarks.paper.setting import Case, accuracy, case
from benchmarks.records import write
from fxfuse import Calibration, Match, Refit, Transplant
from fxfuse.refine import match

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "calibration_data.json"
PAGE = ROOT / "docs" / "how-to" / "choose-calibration-data.md"
NETWORKS, N, SEEDS, STEPS, KINDS_SIZE = ("mlp", "vgg"), 2, 3, 100, 500
COUNTS, WITH_COPIES = (10, 30, 100, 300, 1000), (30, 100, 1000)
CONTROLS = ("best member", "ensemble")


def inputs_of(made: Case) -> Iterator[tuple[str, str, Tensor, int]]:
    """(table, row, inputs `[n, 1, 28, 28]`, copies of each) of everything that is tried."""
    generator = torch.Generator().manual_seed(made.seed)
    inputs, labels = made.train
    order = torch.randperm(len(inputs), generator=generator)
    inputs, labels = inputs[order], labels[order]
    for count in COUNTS:
        yield "count", f"{count:,}", inputs[:count], 0
    for count in WITH_COPIES:
        yield "count", f"{count:,} and a copy of each", inputs[:count], 1
    for row, kind in kinds_of(inputs, labels, generator):
        yield "kind", row, kind, 0


def kinds_of(
    inputs: Tensor, labels: Tensor, generator: torch.Generator
) -> Iterator[tuple[str, Tensor]]:
    """(row, inputs) of every kind of inputs, made of the right ones."""
    own = inputs[:KINDS_SIZE]
    yield "images of all classes", own
    yield "images of member 0's classes", inputs[labels % N == 0][:KINDS_SIZE]
    yield "images of one class", inputs[labels == 0][:KINDS_SIZE]
    yield "the images with black and white exchanged", 1 - own
    yield "scikit-learn's digits, 8 x 8 enlarged", enlarged_digits(generator)
    pixels = own.flatten(1)
    shuffled = pixels.gather(1, torch.rand(pixels.shape, generator=generator).argsort(1))
    yield "the images with pixels in random places", shuffled.view_as(own)
    noise = torch.randn(own.shape, generator=generator) * own.std() + own.mean()
    yield "noise of the images' mean and deviation", noise


def enlarged_digits(generator: torch.Generator) -> Tensor:
    """Digits of other writers and another scanner, as large as MNIST's, `[500, 1, 28, 28]`."""
    digits = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 16
    chosen = torch.randperm(len(digits), generator=generator)[:KINDS_SIZE]
    larger = functional.interpolate(digits[chosen], size=(20, 20), mode="bilinear")
    return functional.pad(larger, (4, 4, 4, 4))


def measure(made: Case) -> list[dict[str, Any]]:
    """Accuracy on test data of the controls and for each kind of inputs."""
    controls = zip(CONTROLS, (made.best, made.ensemble), strict=True)
    rows: list[dict[str, Any]] = [
        {"table": "control", "row": name, "refit": accuracy(model, *made.test)}
        for name, model in controls
    ]
    for table, row, inputs, copies in inputs_of(made):
        result = fxfuse.fuse(
            made.members,
            made.calibration[:4],
            calibration=Calibration(inputs, augmentations=copies),
            method=Transplant(score="obs"),
            refine=[Refit()],
        )
        refitted = accuracy(result.module, *made.test)
        match(result.module, made.members, inputs, Match(steps=STEPS))
        matched = accuracy(result.module, *made.test)
        found = {"table": table, "row": row, "inputs": len(inputs)}
        rows.append({**found, "refit": refitted, "matched": matched})
    return rows


def tables(results: dict[str, Any]) -> str:
    """Both tables, and what they were measured with."""
    lines = []
    for table, title in (("count", "inputs"), ("kind", f"{KINDS_SIZE} inputs")):
        heads = [f"{network}, {way}" for network in NETWORKS for way in ("refit", "matched")]
        lines += [f"| {title} | {' | '.join(heads)} |", f"| --- |{' ---: |' * len(heads)}"]
        names = dict.fromkeys(
            row["row"] for c in results["cases"] for row in c["rows"] if row["table"] == table
        )
        for name in (*CONTROLS, *names):
            cells = [_cell(results, network, table, name, way) for network, way in _columns()]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines.append("")
    lines.append(
        f"Test accuracy in percent, mean [least, greatest] of {results['seeds']} seeds; {N} "
        f"specialists, {STEPS} steps of matching. `python -m benchmarks.calibration_data`, "
        f"{results['cpu_seconds'] / 60:.1f} CPU minutes, torch {results['torch']}."
    )
    return "\n".join(lines) + "\n"


def _columns() -> list[tuple[str, str]]:
    return [(network, way) for network in NETWORKS for way in ("refit", "matched")]


def _cell(results: dict[str, Any], network: str, table: str, name: str, way: str) -> str:
    values = [
        row[way]
        for c in results["cases"]
        if c["network"] == network
        for row in c["rows"]
        if row["row"] == name and row["table"] in (table, "control") and way in row
    ]
    if not values:
        return "–"
    return f"{statistics.mean(values):.1f} [{min(values):.1f}, {max(values):.1f}]"


def measured() -> dict[str, Any]:
    """All cases, one after the other, on one thread."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # few inputs are warned of, and are the point here
    start = time.process_time()
    cases = []
    for network in NETWORKS:
        for seed in range(SEEDS):
            rows = measure(case(network, load("mnist5k"), "specialists", N, seed))
            cases.append({"network": network, "seed": seed, "rows": rows})
            print(network, seed, [(r["row"], round(r["refit"], 1)) for r in rows], flush=True)
    seconds = time.process_time() - start
    return {
        "schema": 1,
        "torch": torch.__version__,
        "seeds": SEEDS,
        "cpu_seconds": seconds,
        "cases": cases,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only look whether the page is stale")
    options = parser.parse_args()
    if not options.check:
        write(RESULTS, measured())
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    page = with_tables(PAGE.read_text(encoding="utf-8"), "calibration", tables(results))
    return update({PAGE: page}, "python -m benchmarks.calibration_data", check=options.check)


if __name__ == "__main__":
    sys.exit(main())
