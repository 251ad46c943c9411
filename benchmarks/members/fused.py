"""Fuses two specialists for CIFAR-10's classes without labels, beside other methods and controls.

    python -m benchmarks.members.fused halves [--seeds 0 1 2] [--sizes 1] [--seconds 60]
    python -m benchmarks.members.fused same [--network mlp] [--sizes 0.5 1 1.5 2]

`halves`: two members of five classes each, the setting of ZipIt and PLeaS. `same`: four members
that saw all classes. Calibration inputs are a sample of images that no member was trained on, and
have no labels. Rows of other methods are these methods on this project's coupling groups; nothing
follows them but what their papers have follow, as the name of the row says. Test images are looked
at once, after everything was chosen.

The share of the way is (result - best member) / (ensemble - best member), in accuracy.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fxfuse
from benchmarks import records
from benchmarks.members.cifar10 import Cifar10, load
from benchmarks.members.train import WEIGHTS, kept
from benchmarks.real.controls import (
    accuracy,
    best_member,
    distil,
    interval,
    kl,
    mean_of,
    outputs_of,
    right,
)
from fxfuse.refine import repair

RESULTS = Path(__file__).resolve().parents[1] / "results" / "cifar10.json"
_BATCH = 500
#: Methods whose result has a member's size, and what their papers have follow.
_OTHERS: dict[str, tuple[Callable[[], Any], bool]] = {
    "average": (fxfuse.Average, False),
    "weight matching + REPAIR": (fxfuse.WeightMatching, True),
    "activation matching + REPAIR": (fxfuse.ActivationMatching, True),
    "optimal transport": (fxfuse.OptimalTransport, False),
    "ZipIt + REPAIR": (fxfuse.Zip, True),
    "clusters, no fit": (fxfuse.Cluster, False),
    "transplant (l2)": (lambda: fxfuse.Transplant(score="l2"), False),
}


def main() -> None:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("setting", choices=("halves", "same"))
    made.add_argument("--network", default="resnet20")
    made.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    made.add_argument("--sizes", type=float, nargs="+", default=[1.0])
    made.add_argument("--seconds", type=float, default=60.0, help="CPU seconds of matching")
    made.add_argument("--calibration", type=int, default=1000, help="inputs without labels")
    made.add_argument("--data-root", type=Path, default=Path("../shared/data"))
    made.add_argument("--weights", type=Path, default=WEIGHTS, help="where weights are kept")
    made.add_argument("--keep", action="store_true", help="keep other rows that were measured")
    options = made.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", UserWarning)
    data = load(options.data_root)
    rows = _named(records.earlier(RESULTS, "rows", keep=options.keep))
    for row in run(options, data):
        print(row, flush=True)
        rows |= _named([row | {"commit": records.described()}])
        records.write(RESULTS, {"torch": torch.__version__, "rows": list(rows.values())})


def _named(rows: Sequence[dict[str, Any]]) -> dict[tuple[Any, ...], dict[str, Any]]:
    keys = ("setting", "network", "seed", "size", "row")
    return {tuple(row[key] for key in keys): row for row in rows}


def run(options: argparse.Namespace, data: Cifar10) -> Iterator[dict[str, Any]]:
    """Measure every row of a setting."""
    for seed in options.seeds:
        names = (
            [f"{options.network}-halves-{seed}-{i}" for i in range(2)]
            if options.setting == "halves"
            else [f"{options.network}-same-{i}" for i in range(4)]
        )
        members = [kept(options.network, name, options.weights) for name in names]
        given = data.calibration(options.calibration, seed)
        for size in options.sizes:
            about = {"setting": options.setting, "network": options.network, "size": size}
            for row in _rows(members, given, data, size, options.seconds):
                yield about | {"seed": seed, "calibration inputs": options.calibration} | row


def _rows(
    members: Sequence[nn.Module], given: Tensor, data: Cifar10, size: float, seconds: float
) -> Iterator[dict[str, Any]]:
    images, labels = data.test.inputs, data.test.labels
    found = [outputs_of(n, images, batch=_BATCH, logits=True) for n in members]
    asked = [outputs_of(n, given, batch=_BATCH, logits=True) for n in members]
    ensemble, best = mean_of(found), best_member(asked)
    ends = (accuracy(found[best], labels), accuracy(ensemble, labels))

    def row(name: str, own: Tensor, cost: float, **more: Any) -> dict[str, Any]:
        good = [right(p, labels) for p in (own, found[best])]
        reached = accuracy(own, labels)
        return {
            "row": name,
            "accuracy": reached,
            "best member": ends[0],
            "ensemble": ends[1],
            "share of the way": (reached - ends[0]) / (ends[1] - ends[0]),
            "KL to the ensemble": kl(ensemble, own),
            "gain over the best member": interval(100 * (good[0] - good[1])),
            "CPU seconds": round(cost, 1),
        } | more

    def fused(
        name: str, calibration: Tensor | None = given, repaired: bool = False, **how: Any
    ) -> dict[str, Any]:
        begin = time.process_time()
        result = fxfuse.fuse(
            members, given[:2], calibration=calibration, size=size, verify=False, **how
        )
        if repaired:
            repair(result, members, given)
        cost = time.process_time() - begin
        history = {"handed over": result.history.chosen} if result.history else {}
        own = outputs_of(result.module, images, batch=_BATCH, logits=True)
        return row(name, own, cost, **history)

    if size == 1:
        for name, (method, repaired) in _OTHERS.items():
            chosen = method()
            looked_at = None if chosen.weights_only else given
            yield fused(name, looked_at, repaired, method=chosen, refine=[])
        yield fused("clusters + refit", method=fxfuse.Cluster(), refine=[fxfuse.Refit()])
    yield fused("no step", refine=[fxfuse.Refit()])
    with_steps = fused("matched", refine=[fxfuse.Refit(), fxfuse.Match(seconds=seconds)])
    yield with_steps
    if size == 1:
        spent = with_steps["CPU seconds"]
        loop, steps = distil(
            members[best], given, mean_of(asked), seconds=spent, batch=64, logits=True
        )
        own = outputs_of(loop, images, batch=_BATCH, logits=True)
        yield row("best member, the same seconds of a plain loop", own, spent, steps=steps)


if __name__ == "__main__":
    main()
