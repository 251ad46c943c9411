"""The sweep: what the analyzer makes of every model, and whether the oracles hold on it.

    python benchmarks/coverage.py [--only PATTERN ...] [--jobs 2] [--json FILE]
        [--keep [--analyze]]

Each model runs in a process of its own, with a limit of time and of memory. Networks have random
weights in float64, made so that an oracle can see: normalisation statistics calibrated on a batch
and jittered, zero-initialised weights randomised, and the outputs shown to depend on the input.
With `--keep`, models that are in the JSON file already are not measured again, but for failures
and for uses that their rows lack; with `--analyze`, their networks are analyzed again, and the
oracles are not asked.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import fnmatch
import json
import multiprocessing
import multiprocessing.connection
import os
import re
import resource
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import fxfuse
from benchmarks.coverage_models import BATCH, build, models
from benchmarks.records import earlier, versions, write
from benchmarks.transformers_models import NotBuiltError
from fxfuse import Example, verify
from fxfuse.graph.rebuild import rebuild
from tests.models import excite

RESULTS = Path(__file__).parent / "results" / "coverage.json"
#: Above this many weights, two members and their concatenation take too long and too much memory.
WIDE_LIMIT = 50_000_000
#: Outputs that differ less than this between two inputs tell an oracle nothing.
BLIND = 1e-6
#: What is done with the models of a library, beside the oracles.
USES = dict.fromkeys(
    ("plain", "transformers", "transformers-types"), ("fuse", "prune", "stack", "refit")
)


def measure(name: str) -> dict[str, Any]:
    """What the analyzer makes of one model."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    row: dict[str, Any] = {"model": name}
    try:
        model, args, kwargs = build(name)
    except NotBuiltError as error:
        return {**row, "not_built": str(error)}
    program, analyzed = _analyzed(model, args, kwargs)
    row |= analyzed
    uses = USES.get(name.partition(":")[0], ())
    if uses:
        row["uses"] = _used_so(name, program, uses)
    del program, model
    member = double(name, 0)
    graph = fxfuse.analyze(member)
    check = verify.permutation_of(graph)
    row["permutation"] = check.error
    row["permutation_tolerance"] = check.tolerance
    row["permutation_passed"] = check.passed
    row["sensitivity"] = verify.sensitivity(member)
    if row["sensitivity"] < BLIND:
        row["failure"] = "blind: the outputs hardly depend on the input"
    if not member.is_exported:
        row["wide"] = "traced"
    elif graph.mixing:
        row["wide"] = "mixes"
    elif row["parameters"] > WIDE_LIMIT:
        row["wide"] = "too large"
    else:
        row["wide"] = _wide(name, member)
    return row


def _analyzed(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[fxfuse.Program, dict[str, Any]]:
    """Captures and analyzes in float32: what a user does, and what the times are claimed for."""
    row: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters())}
    torch.manual_seed(0)
    excite(model, args, kwargs)
    start = time.perf_counter()
    program = fxfuse.capture(model, Example(args, kwargs=kwargs))
    row["capture_s"] = round(time.perf_counter() - start, 3)
    row["capture"] = "export" if program.is_exported else "trace"
    row["nodes"] = len(program.graph.nodes)
    before = _peak_gb()
    start = time.perf_counter()
    graph = fxfuse.analyze(program)
    row["analysis_s"] = round(time.perf_counter() - start, 3)
    row["analysis_gb"] = round(_peak_gb() - before, 2)
    row["groups"] = len(graph.groups)
    row["units"] = sum(g.n_units for g in graph.groups)
    row["free"] = round(graph.free_fraction, 4)
    row["frozen"] = _reasons(graph)
    row["mixes"] = len(graph.mixing)
    row["without_rule"] = [gap.operator for gap in graph.without_rule]
    return program, row


def complete(row: dict[str, Any]) -> dict[str, Any]:
    """A row as it was measured before, analyzed again, with the uses that it lacks.

    Times and memory stay: those of one table are of one machine.
    """
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    program, analyzed = _analyzed(*build(row["model"]))
    if lacking := _lacking(row):
        analyzed["uses"] = row.get("uses", {}) | _used_so(row["model"], program, lacking)
    kept = {name: row[name] for name in ("capture_s", "analysis_s", "analysis_gb") if name in row}
    return row | analyzed | kept


def _has_failed(row: Mapping[str, Any]) -> bool:
    failed = {"failure", "not_built"} & row.keys()
    return bool(failed) or any(use != "ok" for use in row.get("uses", {}).values())


def _lacking(row: Mapping[str, Any]) -> list[str]:
    uses = USES.get(row["model"].partition(":")[0], ())
    return [use for use in uses if use not in row.get("uses", {})]


def _used_so(name: str, first: fxfuse.Program, uses: Sequence[str]) -> dict[str, str]:
    """For each use "ok", or why two members of a model cannot be used so."""
    model, args, kwargs = build(name, 1)
    torch.manual_seed(1)
    excite(model, args, kwargs)
    if first.is_exported:
        # Members share the first one's graph, which saves an export.
        state = model.state_dict(keep_vars=True)
        second = dataclasses.replace(first, module=rebuild(first.module, state))
    else:
        second = fxfuse.capture(model, Example(args, kwargs=kwargs))
    return {use: _tried([first, second], use) for use in uses}


def _tried(members: list[fxfuse.Program], use: str) -> str:
    try:
        module, least, most = _used(members, use)
        ratio = _weights(module) / _weights(members[0].module)
        args, kwargs = members[0].example_inputs
        with torch.no_grad():
            output = module(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"
    if not output.isfinite().all():
        return "an output is not finite"
    return "ok" if least <= ratio <= most else f"{ratio:.2f} times the weights of a member"


def _used(members: list[fxfuse.Program], use: str) -> tuple[torch.fx.GraphModule, float, float]:
    """The network, and how many of a member's weights it has at least and at most."""
    if use == "fuse":
        return fxfuse.fuse(members, size=1.5).module, 1.1, 3.4
    if use == "prune":
        return fxfuse.prune(members[0], size=0.5).module, 0.1, 0.8
    if use == "stack":
        # What leads to no output is not stacked.
        return fxfuse.stack(members), 1, 2
    inputs = [_rolled(members[0].example_inputs, by) for by in range(8)]
    refined = fxfuse.fuse(members, calibration=inputs, refine=[fxfuse.Refit()])
    return refined.module, 1, 1


def _rolled(example: tuple[tuple[Any, ...], dict[str, Any]], by: int) -> Any:
    """Other inputs of the same kind: those of the example, rolled along their last dimension.

    Positional integers are edges and the like, and stay; keyword ones are tokens.
    """
    args, kwargs = example
    if kwargs:
        return {name: x.roll(by, -1) for name, x in kwargs.items()}
    return tuple(x.roll(by, -1) if x.is_floating_point() else x for x in args)


def _weights(module: torch.fx.GraphModule) -> int:
    """How many weights a graph reads: those of other inputs stay as they are."""
    read = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    named = module.named_parameters(remove_duplicate=False)
    return sum({id(tensor): tensor.numel() for name, tensor in named if name in read}.values())


def double(name: str, seed: int) -> fxfuse.Program:
    """A member in float64, or in float32 where its own code casts to that.

    The oracles run both in float64: they lift the casts of a captured graph.
    """
    model, args, kwargs = build(name, seed)
    doubled: Any = torch.utils._pytree.tree_map_only(
        torch.Tensor, lambda x: x.double() if x.is_floating_point() else x, (args, kwargs)
    )
    try:
        return _excited(copy.deepcopy(model).double(), *doubled, seed)
    except RuntimeError as error:
        single = "scalar type|dtype|type .* should be the same|without overflow"
        if not re.search(single, str(error)):
            raise
    return _excited(model, args, kwargs, seed)


def _excited(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], seed: int
) -> fxfuse.Program:
    torch.manual_seed(seed)
    return fxfuse.capture(excite(model, *_more(args, kwargs)), Example(args, kwargs=kwargs))


def _more(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A larger batch than the example, so that calibrated statistics are no accident."""

    def more(x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or x.dim() < 2 or x.shape[0] != BATCH:
            return x
        return torch.cat([x, x.flip(-1), x.roll(1, -1).flip(0), x.flip(1)])

    found: Any = torch.utils._pytree.tree_map(more, (args, kwargs))
    return found


def _wide(name: str, member: fxfuse.Program) -> float | str:
    try:
        check = verify.concatenation_equals_ensemble([member, double(name, 1)])
    except fxfuse.FxfuseError as error:
        return f"not written: {' '.join(str(error).split())}"
    if check.tolerance == float("inf"):
        return "mixes"
    return check.error if check.passed else f"VIOLATION: {check.error:.1e}"


def _reasons(graph: fxfuse.CouplingGraph) -> list[str]:
    """Why parameters without a free dimension are frozen, the heaviest reason first."""
    free = {name for name, _ in graph.group_of}
    weights: Counter[str] = Counter()
    for name, parameter in graph.program.module.named_parameters():
        if name in free or graph.program.canonical[name] != name:
            continue
        reasons = [r for (n, _), r in graph.frozen.items() if n == name and r.node] or [
            r for (n, _), r in graph.frozen.items() if n == name
        ]
        reason = min(reasons, key=lambda r: r.kind != "base", default=None)
        text = f"{reason.kind}: {reason.why} [{reason.source}]" if reason else "no dimension"
        weights[text] += parameter.numel()
    total = sum(p.numel() for p in graph.program.module.parameters()) or 1
    return [f"{n / total:.2%} {why}" for why, n in weights.most_common(6)]


def _peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _child(
    name: str,
    memory_gb: float,
    pipe: multiprocessing.connection.Connection,
    measure: Callable[[str], dict[str, Any]],
) -> None:
    limit = int(memory_gb * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    try:
        row = measure(name)
    except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        text = " ".join(str(error).split())
        row = {
            "model": name,
            "failure": f"{type(error).__name__}: {text[:600]}",
            "where": f"{last.filename}:{last.lineno}",
        }
    pipe.send(row)


def sweep(
    names: list[str],
    jobs: int,
    seconds: float,
    memory_gb: float,
    done: Any,
    measure: Callable[[str], dict[str, Any]] = measure,
) -> None:
    """Measures models in processes of their own and hands each row to `done`."""
    context = multiprocessing.get_context("fork")
    waiting = list(reversed(names))
    running: dict[str, tuple[Any, Any, float]] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            name = waiting.pop()
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(name, memory_gb, theirs, measure))
            process.start()
            theirs.close()
            running[name] = (process, ours, time.monotonic())
        multiprocessing.connection.wait([pipe for _, pipe, _ in running.values()], timeout=1)
        for name, (process, pipe, start) in list(running.items()):
            spent = time.monotonic() - start
            if pipe.poll():
                try:
                    row = pipe.recv()
                except EOFError:
                    row = {"model": name, "failure": f"the process ended ({process.exitcode})"}
            elif spent > seconds:
                process.kill()
                row = {"model": name, "failure": f"took longer than {seconds:.0f} s"}
            else:
                continue
            process.join()
            del running[name]
            done({**row, "seconds": round(spent, 1)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=["*"])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--memory", type=float, default=11, help="GB for each process")
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--analyze", action="store_true", help="analyze kept rows again")
    options = parser.parse_args()
    rows = {r["model"]: r for r in earlier(options.json, "rows", keep=options.keep)}
    wanted = [m for m in models() if any(fnmatch.fnmatch(m, p) for p in options.only)]
    names = [m for m in wanted if m not in rows or _has_failed(rows[m])]
    kept = [m for m in wanted if m not in names]
    lacking = [m for m in kept if options.analyze or _lacking(rows[m])]
    known = versions()

    def done(row: dict[str, Any]) -> None:
        if row["model"] in lacking and "failure" in row and not options.analyze:
            before = rows[row["model"]]
            row = {
                **before,
                "uses": before.get("uses", {}) | dict.fromkeys(_lacking(before), row["failure"]),
            }
        rows[row["model"]] = row
        print(json.dumps(row), flush=True)
        found = [rows[m] for m in models() if m in rows]
        write(options.json, {"versions": known, "models": len(models()), "rows": found})

    def one(name: str) -> dict[str, Any]:
        return complete(rows[name]) if name in lacking else measure(name)

    sweep(names + lacking, options.jobs, options.seconds, options.memory, done, one)
    failures = [r["model"] for r in rows.values() if "failure" in r]
    violations = [
        r["model"]
        for r in rows.values()
        if not r.get("permutation_passed", True) or str(r.get("wide", "")).startswith("VIOLATION")
    ]
    print(f"{len(rows)} models, {len(failures)} failures, {len(violations)} oracle violations")


if __name__ == "__main__":
    main()
