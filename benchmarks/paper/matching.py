"""Label-free matching against distillation: what a few CPU seconds make of the best member.

    python -m benchmarks.paper.matching [--json benchmarks/results/matching.json]

Rows: the member that validates best; it after matching and after KL distillation at T = 2, both for
the same CPU seconds on the same unlabelled training inputs; the ensemble. The learning rate of
distillation is chosen on validation data (and the search is not counted), that of matching is its
default. Test inputs report.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.paper import datasets
from benchmarks.paper.datasets import load
from benchmarks.paper.networks import NETWORKS
from benchmarks.paper.setting import SETTINGS, Case, accuracy, case
from fxfuse import Match
from fxfuse.cli.data import Batches
from fxfuse.refine import default_optimizer, distill, match

# Networks on the data where they are neither at chance nor without an error.
PLACES = {
    "same data": {"mlp": "mnist5k", "vgg": "mnist5k", "resnet": "mnist5k", "vit": "mnist1d"},
    "specialists": {"mlp": "mnist5k", "vgg": "mnist1d", "resnet": "mnist1d", "vit": "mnist1d"},
}
RATES = (1e-3, 3e-3, 1e-2)
TEMPERATURE = 2.0
BATCH = 64
_TIMED_STEPS = 10


def matched(made: Case, seconds: float) -> tuple[nn.Module, float]:
    """The best member after matching, and the CPU seconds that it took."""
    module = copy.deepcopy(made.best)
    report = match(module, made.members, made.calibration, Match(seconds=seconds, seed=made.seed))
    return module, report.seconds


def distilled(
    made: Case, seconds: float, train: tuple[Tensor, Tensor] | None = None
) -> tuple[nn.Module, float]:
    """The best member after KL distillation, of the rates the best on validation data.

    Args:
        made: The members and their data.
        seconds: CPU seconds of one run.
        train: Inputs [n, ...] and labels [n], of which no use is made; None takes all of training.
    """
    data = made.train if train is None else train
    probe, _ = _distilled(made, _TIMED_STEPS, RATES[0], data)
    steps = max(1, round(_TIMED_STEPS * seconds / probe))
    runs = [_distilled(made, steps, rate, data) for rate in RATES]
    used, module = max(runs, key=lambda run: accuracy(run[1], *made.val))
    return module, used


def _distilled(
    made: Case, steps: int, rate: float, train: tuple[Tensor, Tensor]
) -> tuple[float, nn.Module]:
    module = copy.deepcopy(made.best)
    optimizer, scheduler = default_optimizer(module, steps, rate)
    start = time.process_time()
    distill(
        module,
        made.members,
        Batches(*train, BATCH, seed=made.seed),
        steps=steps,
        temperature=TEMPERATURE,
        optimizer=optimizer,
        scheduler=scheduler,
        progress=False,
        seed=made.seed,
    )
    return time.process_time() - start, module


def measure(made: Case, budgets: list[float]) -> dict[str, tuple[float, float]]:
    """Test accuracy in percent and CPU seconds of every row."""
    rows = {"best member": (accuracy(made.best, *made.test), 0.0)}
    for seconds in budgets:
        for name, refine in (("match", matched), ("KL distillation", distilled)):
            module, used = refine(made, seconds)
            rows[f"+ {name} {seconds:g} s"] = (accuracy(module, *made.test), used)
    rows["ensemble"] = (accuracy(made.ensemble, *made.test), 0.0)
    return rows


def summary(runs: list[dict[str, tuple[float, float]]]) -> dict[str, dict[str, float]]:
    """Mean, least and greatest accuracy, worst difference to the best member, share of the gain."""
    best = [run["best member"][0] for run in runs]
    gain = statistics.mean(run["ensemble"][0] for run in runs) - statistics.mean(best)
    table = {}
    for name in runs[0]:
        values = [run[name][0] for run in runs]
        row = {"mean": statistics.mean(values), "min": min(values), "max": max(values)}
        row["worst_gain"] = min(v - b for v, b in zip(values, best, strict=True))
        if gain > 0:
            row["share_of_gain"] = (row["mean"] - statistics.mean(best)) / gain
        row["cpu_seconds"] = statistics.mean(run[name][1] for run in runs)
        table[name] = {key: round(value, 3) for key, value in row.items()}
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--network", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--setting", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--data", choices=datasets.NAMES, help="instead of the network's own")
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("-n", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--seconds", type=float, nargs="+", default=[3.0, 10.0])
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    for setting, network, n in itertools.product(options.setting, options.network, options.n):
        data = load(options.data or PLACES[setting][network], options.data_root)
        cases = [case(network, data, setting, n, seed) for seed in range(options.seeds)]
        rows = summary([measure(made, options.seconds) for made in cases])
        about = {"data": data.name, "network": network, "setting": setting, "n": n}
        results.append({**about, "rows": rows})
        print(f"{network} on {data.name}, {setting}, N = {n}")
        for name, row in rows.items():
            spread = f"{row['mean']:5.1f} [{row['min']:5.1f}, {row['max']:5.1f}]"
            share = f"{100 * row['share_of_gain']:4.0f} %" if "share_of_gain" in row else ""
            print(f"  {name:24}{spread}  {share:7}{row['cpu_seconds']:6.1f} s", flush=True)
    if options.json:
        told = {
            "torch": torch.__version__,
            "seeds": options.seeds,
            "budgets_cpu_seconds": options.seconds,
            "distillation": {"temperature": TEMPERATURE, "rates": RATES, "batch": BATCH},
            "test_accuracy_percent": results,
        }
        options.json.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
