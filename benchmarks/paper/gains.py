"""The gain of a fused network: where it stands between the best member and the ensemble.

    python -m benchmarks.paper.gains [--network vgg ...] [--setting specialists] [-n 2 4]
        [--seeds 3] [--first-seed 0] [--seconds 10] [--keep] [--json benchmarks/results/gains.json]

Rows, all on the same at most 1,000 unlabelled training inputs: plain NT; averaging; weight
matching and recalibration; NT, and obs, with the closed-form refit (no step); obs and the refit on
a part of the inputs, and matching for what is left of 2 CPU seconds in all; `auto` with its budget.
Where a network has residual streams (the vision transformer), these merge them (`components`), and
a row of its own chooses units there, too.
Controls at the CPU time that `auto` took in all: matching from plain NT and from the best member,
KL distillation of the best member with the best of three rates on validation data (the search is
not counted); and, without a step, the best member with a refitted head. One row alone uses labels,
those of all training inputs: plain NT after 160 steps of fine-tuning, the better of two rates.
Validation data chooses the best member, test inputs report. The JSON is written case by case;
`python -m benchmarks.paper.gains_page` writes the page.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import platform
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fxfuse
from benchmarks.paper.datasets import load
from benchmarks.paper.gains_tables import markdown
from benchmarks.paper.matching import PLACES, distilled
from benchmarks.paper.networks import NETWORKS
from benchmarks.paper.setting import SETTINGS, Case, accuracy, case
from benchmarks.records import earlier, write
from fxfuse.calibrate.streams import streams
from fxfuse.data import Batches
from fxfuse.refine import default_optimizer, finetune, match, recalibrate, refit_head

CONDITIONS = (
    "One thread; budgets and times are CPU seconds of the process, because other work shares the "
    "machine, which makes a CPU second do less than on an idle one."
)
RESULTS = Path(__file__).parents[1] / "results" / "gains.json"
CALIBRATION = 1000
#: CPU seconds of the quick row; how many inputs its selection and refit read, as the time that all
#: of them would take is better spent on steps; seconds below which matching is left out, as a few
#: steps do more harm than good. Chosen on other seeds than those reported.
QUICK, QUICK_INPUTS, QUICK_LEAST = 2.0, 500, 0.5
LABELLED_STEPS, LABELLED_RATES, BATCH = 160, (3e-3, 1e-2), 64


def measure(made: Case, seconds: float) -> dict[str, dict[str, Any]]:
    """Test accuracy in percent and CPU seconds of every row."""
    members, x = list(made.members), made.calibration
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(made.seed))
    chosen = order[:CALIBRATION]
    x = x[chosen]
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
    plain = result.module
    note("NT", plain, spent)
    module, used = labelled(made, plain)
    note("NT + 160 fine-tuning steps", module, spent + used)
    result, spent = fused(calibration=x, refit=True)
    note("NT + refit", result.module, spent)
    if streams(fxfuse.analyze(captured[0])):
        result, spent = fused(score="obs", calibration=x, refit=True)
        note("obs + refit, streams by units", result.module, spent)
    # Without residual streams the variant is the plain transplant.
    best = {"score": "obs", "variant": "components"}
    result, spent = fused(**best, calibration=x, refit=True)
    note("obs + refit", result.module, spent)
    result, spent = fused(**best, calibration=x[:QUICK_INPUTS], refit=True)
    module = result.module
    steps = 0
    if QUICK - spent >= QUICK_LEAST:
        report = match(module, members, x, seconds=QUICK - spent, seed=made.seed)
        spent += report.seconds
        steps = report.steps
    note("obs + refit + matching, 2 s", module, spent, steps=steps)
    result, spent = fused(method="auto", **best, calibration=x, seconds=seconds)
    note("auto", result.module, spent, start=result.choice.start, kept=result.choice.kept)
    start = time.process_time()
    module = copy.deepcopy(made.best)
    refit_head(module, members, x, layer="head")
    note("best member + head refit", module, time.process_time() - start)
    for name, begin in (("NT", plain), ("best member", made.best)):
        module = copy.deepcopy(begin)
        report = match(module, members, x, seconds=spent, seed=made.seed)
        note(f"{name} + matching", module, report.seconds)
    inputs, labels = made.train
    module, used = distilled(made, spent, (inputs[chosen], labels[chosen]))
    note("best member + KL distillation", module, used)
    return rows


def labelled(made: Case, start: nn.Module) -> tuple[nn.Module, float]:
    """A copy after fine-tuning on labels, of the rates the best on validation data."""
    runs = []
    for rate in LABELLED_RATES:
        module = copy.deepcopy(start)
        optimizer, scheduler = default_optimizer(module, LABELLED_STEPS, rate)
        begin = time.process_time()
        finetune(
            module,
            Batches(*made.train, BATCH, seed=made.seed),
            steps=LABELLED_STEPS,
            optimizer=optimizer,
            scheduler=scheduler,
            progress=False,
            seed=made.seed,
        )
        runs.append((time.process_time() - begin, module))
    used, module = max(runs, key=lambda run: accuracy(run[1], *made.val))
    return module, used


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--setting", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("-n", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--keep", action="store_true", help="do not measure again what is there")
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    cases = earlier(options.json, "cases", keep=options.keep)
    done = {(c["network"], c["setting"], c["n"], c["seed"], c["budget"]) for c in cases}
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    wanted = itertools.product(seeds, options.network, options.setting, options.n)
    for seed, network, setting, n in wanted:
        key = (network, setting, n, seed, options.seconds)
        if key in done:
            continue
        data = PLACES[setting][network]
        rows = measure(case(network, load(data), setting, n, seed), options.seconds)
        about = {"network": network, "data": data, "setting": setting, "n": n, "seed": seed}
        cases.append({**about, "budget": options.seconds, "rows": rows})
        content = {
            "schema": 1,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "conditions": CONDITIONS,
            "cases": cases,
        }
        write(options.json, content)
        print(key, {k: round(r["accuracy"], 1) for k, r in rows.items()}, flush=True)
    print(markdown(cases))


if __name__ == "__main__":
    main()
