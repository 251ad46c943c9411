"""The gain of a fused network: where it stands between the best member and the ensemble.

    python -m benchmarks.paper.gains [--network vgg ...] [--setting specialists] [-n 2 4]
        [--seeds 3] [--first-seed 0] [--seconds 10] [--keep | --rows auto ...]
        [--json benchmarks/results/gains.json]

Rows, all on the same at most 1,000 unlabelled training inputs: plain NT; averaging; weight
matching and recalibration; NT, and obs, with the closed-form refit (no step), the latter also
with an augmented copy of each input; obs and the refit on a part of the inputs, and matching for
what is left of 2 CPU seconds in all; `auto` with its budget. The refit and `auto` are measured for
both ensembles, the mean of probabilities, which is the default, and the mean of logits.
Where a network has residual streams (the vision transformer), `obs` and `auto` merge them
(`components`), and a row of its own chooses units there, too, as the 2 seconds do, in which there
is no time to merge.
Controls at the CPU time that `auto` took in all: matching from plain NT and from the best member,
KL distillation of the best member with the best of three rates on validation data (the search is
not counted); and, without a step, the best member with a refitted head. One row alone uses labels,
those of all training inputs: plain NT after 160 steps of fine-tuning, the better of two rates.
Validation data chooses the best member, test inputs report. The JSON is written case by case;
`python -m benchmarks.paper.gains_page` writes the page. `--rows` measures these rows again of cases
that are there, and leaves the others as they are; each row has the commit it was measured with.
`gain` is the difference from the best member in points, with the paired bootstrap interval over
test inputs.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import platform
import time
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fxfuse
from benchmarks.paper.datasets import load
from benchmarks.paper.gains_tables import (
    AUTO,
    AUTO_LOGITS,
    BEST,
    COPIES,
    DISTILLED,
    ENSEMBLE,
    LABELLED,
    REFIT,
    REFIT_LOGITS,
    SOFT_ENSEMBLE,
    markdown,
)
from benchmarks.paper.gains_tables import QUICK as QUICK_ROW
from benchmarks.paper.matching import PLACES, distilled
from benchmarks.paper.networks import NETWORKS
from benchmarks.paper.setting import SETTINGS, Case, accuracy, case, right
from benchmarks.real.controls import interval
from benchmarks.records import described, earlier, write
from fxfuse import Match
from fxfuse.activations.streams import streams
from fxfuse.cli.data import Batches
from fxfuse.cli.evaluate import Ensemble
from fxfuse.refine import default_optimizer, finetune, match, recalibrate, refit_head
from tests.options import flat

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
AVERAGED, ALIGNED = "averaging", "weight matching + recalibration"
PLAIN, PLAIN_REFIT, UNITS = "NT", "NT + refit", "obs + refit, streams by units"
HEAD, PLAIN_MATCHED, BEST_MATCHED = (
    "best member + head refit",
    "NT + matching",
    "best member + matching",
)
#: All rows, in the order of the table.
ROWS = (
    *(BEST, ENSEMBLE, SOFT_ENSEMBLE, AVERAGED, ALIGNED, PLAIN, LABELLED, PLAIN_REFIT, UNITS),
    *(REFIT, COPIES, REFIT_LOGITS, QUICK_ROW, AUTO, AUTO_LOGITS),
    *(HEAD, PLAIN_MATCHED, BEST_MATCHED, DISTILLED),
)


def measure(
    made: Case,
    seconds: float,
    rows: Collection[str] = ROWS,
    earlier_rows: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, dict[str, Any]]:
    """Test accuracy in percent and CPU seconds of rows.

    Args:
        made: The members and their data.
        seconds: Of matching in `auto`.
        rows: Names of those that are wanted; one that the network has not is left out.
        earlier_rows: What was measured before; controls have the time of its `auto` where `auto` is
            not measured again.
    """
    members, x = list(made.members), made.calibration
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(made.seed))
    chosen = order[:CALIBRATION]
    x = x[chosen]
    found: dict[str, dict[str, Any]] = {}

    best_right = right(made.best, *made.test)

    def note(name: str, module: nn.Module, spent: float, **more: Any) -> None:
        own = 100 * right(module, *made.test)
        gain = [round(end, 3) for end in interval(own - 100 * best_right)]
        found[name] = {
            "accuracy": float(own.mean()),
            "gain": gain,
            "seconds": round(spent, 2),
            **more,
        }

    def fused(**options: Any) -> tuple[fxfuse.FusionResult, float]:
        start = time.process_time()
        result = fxfuse.fuse(program, verify=False, **flat(**options))
        return result, time.process_time() - start

    # Capturing is no part of fusing: it is done once, whatever follows.
    program = [fxfuse.capture(member, x[:2]) for member in members]
    soft = Ensemble(members, fxfuse.Classification())
    as_they_are = {BEST: made.best, ENSEMBLE: made.ensemble, SOFT_ENSEMBLE: soft}
    for name in (name for name in as_they_are if name in rows):
        note(name, as_they_are[name], 0.0)
    if AVERAGED in rows:
        note(AVERAGED, *_module(fused(method="average")))
    if ALIGNED in rows:
        result, spent = fused(method="weight_matching")
        recalibrate(result.module, x)
        note(ALIGNED, result.module, spent)
    result, spent = fused()
    plain = result.module
    if PLAIN in rows:
        note(PLAIN, plain, spent)
    if LABELLED in rows:
        module, used = labelled(made, plain)
        note(LABELLED, module, spent + used)
    if PLAIN_REFIT in rows:
        note(PLAIN_REFIT, *_module(fused(calibration=x, refit=True)))
    if UNITS in rows and streams(fxfuse.analyze(program[0])):
        note(UNITS, *_module(fused(score="obs", calibration=x, refit=True)))
    # Without residual streams the variant is the plain transplant.
    best = {"score": "obs", "variant": "components"}
    by_logits = fxfuse.Classification(combine_by="logits")
    own: dict[str, dict[str, Any]] = {
        REFIT: {},
        COPIES: {"augmentations": 1},
        REFIT_LOGITS: {"task": by_logits},
    }
    for name in (name for name in own if name in rows):
        note(name, *_module(fused(**best, calibration=x, refit=True, **own[name])))
    if QUICK_ROW in rows:
        module, spent = _module(fused(score="obs", calibration=x[:QUICK_INPUTS], refit=True))
        steps = 0
        if QUICK - spent >= QUICK_LEAST:
            report = match(module, members, x, Match(seconds=QUICK - spent, seed=made.seed))
            spent += report.seconds
            steps = report.steps
        note(QUICK_ROW, module, spent, steps=steps)
    spent = float((earlier_rows or {}).get(AUTO, {"seconds": seconds})["seconds"])
    for name, task in ((AUTO, None), (AUTO_LOGITS, by_logits)):
        if name in rows:
            options = {**best, "calibration": x, "seconds": seconds, "task": task}
            result, used = fused(method="auto", **options)
            assert result.history is not None
            matched = result.history.chosen.startswith("matched")
            note(name, result.module, used, start=result.plan.options["start"], kept=matched)
            spent = used if name == AUTO else spent
    if HEAD in rows:
        start = time.process_time()
        module = copy.deepcopy(made.best)
        refit_head(module, members, x, layer="head")
        note(HEAD, module, time.process_time() - start)
    for name, begin in ((PLAIN_MATCHED, plain), (BEST_MATCHED, made.best)):
        if name in rows:
            module = copy.deepcopy(begin)
            report = match(module, members, x, Match(seconds=spent, seed=made.seed))
            note(name, module, report.seconds)
    if DISTILLED in rows:
        inputs, labels = made.train
        module, used = distilled(made, spent, (inputs[chosen], labels[chosen]))
        note(DISTILLED, module, used)
    return found


def _module(fused: tuple[fxfuse.FusionResult, float]) -> tuple[nn.Module, float]:
    result, spent = fused
    return result.module, spent


def merged(
    case: Mapping[str, Any] | None, rows: Mapping[str, dict[str, Any]], commit: str
) -> dict[str, dict[str, Any]]:
    """All rows of a case in the order of the table, those that were measured now in place of old.

    Args:
        case: What was measured before, if anything was.
        rows: What was measured now.
        commit: That of the code which measured `rows`; each of them is marked with it.
    """
    told = {name: {**row, "commit": commit} for name, row in rows.items()}
    together = {**(case or {"rows": {}})["rows"], **told}
    return {name: together[name] for name in ROWS if name in together}


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
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--keep", action="store_true", help="do not measure again what is there")
    again.add_argument("--rows", nargs="+", choices=ROWS, help="measure these again, keep others")
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    # Of the code that runs, whatever becomes of the working tree meanwhile.
    commit = described()
    told = earlier(options.json, "cases", keep=options.keep or options.rows is not None)
    cases = {(c["network"], c["setting"], c["n"], c["seed"], c["budget"]): c for c in told}
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    wanted = itertools.product(seeds, options.network, options.setting, options.n)
    for seed, network, setting, n in wanted:
        key = (network, setting, n, seed, options.seconds)
        before = cases.get(key)
        if before and options.keep:
            continue
        data = PLACES[setting][network]
        made = case(network, load(data), setting, n, seed)
        asked = options.rows if before and options.rows else ROWS
        rows = measure(made, options.seconds, asked, before and before["rows"])
        about = {"network": network, "data": data, "setting": setting, "n": n, "seed": seed}
        cases[key] = {**about, "budget": options.seconds, "rows": merged(before, rows, commit)}
        content = {
            "schema": 1,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "conditions": CONDITIONS,
            "cases": list(cases.values()),
        }
        write(options.json, content)
        print(key, {k: round(r["accuracy"], 1) for k, r in rows.items()}, flush=True)
    print(markdown(list(cases.values())))


if __name__ == "__main__":
    main()
