"""The gain of a fused network: where it stands between the best member and the ensemble.

    python -m benchmarks.paper.gains [--network vgg ...] [--setting specialists] [-n 2 4]
        [--seeds 3] [--seconds 10] [--keep] [--json benchmarks/results/gains.json]

Rows, all on the same at most 1,000 unlabelled training inputs: plain NT; averaging; weight
matching and recalibration; NT, and obs, with the closed-form refit (no step); the latter and a
little matching within 2 CPU seconds in all, selection and refit included; `auto` with its budget.
Controls on the best member: refit of the head; the same matching and KL distillation at equal CPU
time, the latter with the best of three rates on validation data (the search is not counted).
Validation data chooses the best member, test inputs report. The JSON is written case by case.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fxfuse
from benchmarks.paper.datasets import load
from benchmarks.paper.matching import PLACES, distilled
from benchmarks.paper.networks import NETWORKS
from benchmarks.paper.setting import SETTINGS, Case, accuracy, case
from fxfuse.refine import match, recalibrate, refit_head

RESULTS = Path(__file__).parents[1] / "results" / "gains.json"
CALIBRATION = 1000
QUICK = 2.0


def measure(made: Case, seconds: float) -> dict[str, dict[str, Any]]:
    """Test accuracy in percent and CPU seconds of every row."""
    members, x = list(made.members), made.calibration
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(made.seed))
    x = x[order[:CALIBRATION]]
    rows: dict[str, dict[str, Any]] = {}

    def note(name: str, module: nn.Module, spent: float, **more: Any) -> None:
        rows[name] = {"accuracy": accuracy(module, *made.test), "seconds": round(spent, 2), **more}

    def fused(**options: Any) -> tuple[fxfuse.FusionResult, float]:
        start = time.process_time()
        result = fxfuse.fuse(captured, verify=False, **options)
        return result, time.process_time() - start

    # Capturing is no part of fusing: it is done once, whatever follows.
    captured = [fxfuse.capture(member, x[:2]) for member in members]
    note("best member", made.best, 0.0)
    note("ensemble", made.ensemble, 0.0)
    for name, method in (("averaging", "average"), ("weight matching", "weight_matching")):
        result, spent = fused(method=method)
        if name == "weight matching":
            recalibrate(result.module, x)
            name += " + recalibration"
        note(name, result.module, spent)
    result, spent = fused()
    note("NT", result.module, spent)
    result, spent = fused(calibration=x, refit=True)
    note("NT + refit", result.module, spent)
    result, spent = fused(score="obs", calibration=x, refit=True)
    note("obs + refit", result.module, spent)
    module = copy.deepcopy(result.module)
    if spent < QUICK:
        report = match(module, members, x, seconds=QUICK - spent, seed=made.seed)
        spent += report.seconds
    note("obs + refit + matching, 2 s", module, spent)
    result, spent = fused(method="auto", calibration=x, seconds=seconds)
    note("auto", result.module, spent, start=result.choice.start, kept=result.choice.kept)
    start = time.process_time()
    module = copy.deepcopy(made.best)
    refit_head(module, members, x, layer="head")
    note("best member + head refit", module, time.process_time() - start)
    module = copy.deepcopy(made.best)
    report = match(module, members, x, seconds=spent, seed=made.seed)
    note("best member + matching", module, report.seconds)
    module, used = distilled(made, spent)
    note("best member + KL distillation", module, used)
    return rows


def summary(cases: list[dict[str, Any]]) -> list[str]:
    """A line for each network, setting and number of members."""
    lines, groups = [], dict[tuple[Any, ...], list[dict[str, Any]]]()
    for each in cases:
        groups.setdefault((each["network"], each["setting"], each["n"]), []).append(each)
    for (network, setting, n), members in groups.items():
        lines.append(f"{network}, {setting}, N = {n}, {len(members)} seeds")
        for name in members[0]["rows"]:
            values = [m["rows"][name]["accuracy"] for m in members]
            gains = [gain(m["rows"], name) for m in members]
            lines.append(
                f"  {name:32}{statistics.mean(values):6.1f} [{min(values):.1f}, {max(values):.1f}]"
                f"  gain {100 * statistics.mean(gains):5.0f} %"
            )
    return lines


def gain(rows: dict[str, Any], name: str) -> float:
    """Share of the way from the best member to the ensemble."""
    low, high = rows["best member"]["accuracy"], rows["ensemble"]["accuracy"]
    return (rows[name]["accuracy"] - low) / (high - low) if high != low else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--setting", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("-n", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--keep", action="store_true", help="do not measure again what is there")
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    cases: list[dict[str, Any]] = []
    if options.keep and options.json.exists():
        cases = json.loads(options.json.read_text(encoding="utf-8"))["cases"]
    done = {(c["network"], c["setting"], c["n"], c["seed"], c["budget"]) for c in cases}
    for seed in range(options.seeds):
        for network in options.network:
            for setting in options.setting:
                for n in options.n:
                    key = (network, setting, n, seed, options.seconds)
                    if key in done:
                        continue
                    data = PLACES[setting][network]
                    made = case(network, load(data), setting, n, seed)
                    rows = measure(made, options.seconds)
                    cases.append(
                        {
                            "network": network,
                            "data": data,
                            "setting": setting,
                            "n": n,
                            "seed": seed,
                            "budget": options.seconds,
                            "rows": rows,
                        }
                    )
                    content = {
                        "schema": 1,
                        "torch": torch.__version__,
                        "python": platform.python_version(),
                        "cases": cases,
                    }
                    options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
                    print(key, {k: round(r["accuracy"], 1) for k, r in rows.items()}, flush=True)
    print("\n".join(summary(cases)))


if __name__ == "__main__":
    main()
