"""Every exported model at other widths: N is the mean of the members, 0.5 and 1.5 run as planned.

    python benchmarks/wide.py [--only PATTERN ...] [--jobs 1] [--keep] [--json FILE]

Two members in float64, made so that an oracle can see, as in `coverage.py`; each model in a process
of its own. Width N: the largest difference from the mean of the members, relative to the largest
output, with members that run one by one where an operator mixes them. Widths 0.5 and 1.5: whether
the network runs, its output has a member's shape, and how far the floating-point operations it
takes are from those that the plan's sizes foretell. The smallest models come first.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))

import fxfuse
from benchmarks.coverage import BLIND, double, sweep
from benchmarks.coverage import RESULTS as COVERAGE
from benchmarks.records import earlier, versions, write
from fxfuse import verify
from fxfuse.analysis.coupling import CouplingGraph
from fxfuse.graph.tensors import tensors_in
from fxfuse.planning.plan import FusionPlan
from fxfuse.planning.size import sizes_of
from fxfuse.transform.cost import operations_of, parameters_of
from fxfuse.transform.emit import FusedModule
from fxfuse.transform.resizing import emit_resized, limit_sizes
from fxfuse.transform.sizes import concatenation_plan
from fxfuse.verify.check import as_double, in_double, inputs_of, run
from tests.options import planned

RESULTS = Path(__file__).parent / "results" / "wide.json"
MEMBERS = 2
WIDTHS = (0.5, 1.5)
LIBRARIES = ("torchvision:*", "transformers:*")


def measure(name: str) -> dict[str, Any]:
    """One model at widths 0.5, 1.5 and N."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    program = [double(name, seed) for seed in range(MEMBERS)]
    graph = fxfuse.analyze(program[0])
    states = [as_double(c.state()) for c in program]
    row: dict[str, Any] = {"model": name, "parameters": parameters_of(graph, {})}
    row["sensitivity"] = verify.sensitivity(program[0])
    if row["sensitivity"] < BLIND:
        row["failure"] = "blind: the outputs hardly depend on the input"
    outputs = [run(c, s) for c, s in zip(program, states, strict=True)]
    row["widths"] = {}
    for width in WIDTHS:
        sizes, refused = limit_sizes(graph, sizes_of(graph, MEMBERS, width, at_least_one=True))
        options = {"score": "l2", "sizes": sizes}
        plan = planned(graph, states, "transplant", **options)
        found, told = _run(graph, plan, emit_resized(graph, plan, states))
        told["shape"] = [t.shape for t in found] == [t.shape for t in outputs[0]]
        told["refused"] = len(refused)
        row["widths"][str(width)] = told
        del found
    plan = concatenation_plan(graph, states)
    module = emit_resized(graph, plan, states)
    found, told = _run(graph, plan, module)
    row["apart"], row["tensors"] = len(plan.names_of("per_member")), len(graph.program.names)
    row["mixes"] = len(plan.mixing.notes)
    means = [torch.stack(each).mean(0) for each in zip(*outputs, strict=True)]
    row["wide"] = verify.relative_error(found, means)
    row["widths"][str(MEMBERS)] = told
    return row


def _run(
    graph: CouplingGraph, plan: FusionPlan, module: FusedModule
) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """Outputs, and the operations that the network takes beside those foretold."""
    args, kwargs = inputs_of(graph.program)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        found = tensors_in(in_double(module)(*args, **kwargs))
    flops, foretold = counter.get_total_flops(), operations_of(graph, plan.sizes(), plan)
    return found, {
        "flops": flops,
        "foretold": foretold,
        "finite": all(bool(t.isfinite().all()) for t in found),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=LIBRARIES)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=900)
    parser.add_argument("--memory", type=float, default=20, help="GB for each process")
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--keep", action="store_true")
    options = parser.parse_args()
    rows = {r["model"]: r for r in earlier(options.json, "rows", keep=options.keep)}
    swept = earlier(COVERAGE, "rows", keep=True)
    size = {r["model"]: r["parameters"] for r in swept if r.get("capture") == "export"}
    every = [m for m in size if any(fnmatch.fnmatch(m, p) for p in LIBRARIES)]
    wanted = [m for m in size if any(fnmatch.fnmatch(m, p) for p in options.only)]
    names = sorted((m for m in wanted if m not in rows or "failure" in rows[m]), key=size.get)
    known = versions()

    def done(row: dict[str, Any]) -> None:
        rows[row["model"]] = row
        print(json.dumps(row), flush=True)
        content = {
            "versions": known,
            "members": MEMBERS,
            "models": len(every),
            "rows": [rows[m] for m in size if m in rows],
        }
        write(options.json, content)

    sweep(names, options.jobs, options.seconds, options.memory, done, measure)
    failures = [r["model"] for r in rows.values() if "failure" in r]
    inexact = [r["model"] for r in rows.values() if r.get("wide", 0) > verify.EXACT]
    print(f"{len(rows)} models, {len(failures)} failures, {len(inexact)} not exact: {inexact}")


if __name__ == "__main__":
    main()
