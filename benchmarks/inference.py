"""Inference with the fused network, a member and the ensemble, eager and compiled, in one run.

    python -m benchmarks.inference [--device cpu] [--members 4] [--networks resnet18,vit]
        [--batches 1 8 64] [--rounds 7] [--seconds 0.3] [--keep] [--json FILE] [--choice]

Each network and batch size has a process of its own, since compiled networks are never let go of.
Every way is first compared with what it stands for. *plain* is `torch.compile(fullgraph=True)` of
the user's own class; *passes* is `fxfuse.compile`, also for the member and for the ensemble one
after the other, so that equals are compared. Times are taken in rounds in which every way has its
turn (`benchmarks/stack.py`); reported is the median over the rounds. On CUDA the peak of the
allocated memory is reported too. Random weights: what a network knows does not change how long it
takes.

`--choice` measures what `fxfuse.compile` and `torch.compile(backend="fxfuse")` choose against what
plain `torch.compile` makes of the same network, in CPU time on one thread.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import os
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn

import fxfuse
from benchmarks import stack
from benchmarks.records import earlier, write
from benchmarks.stack import Sequential, Way, _about, race, through_vmap
from fxfuse.cli.demo.network import SmallResNet
from fxfuse.runtime import Compiled
from fxfuse.runtime import measure as measuring

RESULTS = Path(__file__).parent / "results" / "inference.json"
CHOICE = RESULTS.with_name("choice.json")
BATCHES = (1, 8, 64)
#: Outputs of float32 networks may differ by so much, relative to the largest.
_TOLERANCE = 1e-3

#: Name → how a member is built, and the shape of one example.
NETWORKS: Mapping[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "demo network": (SmallResNet, (1, 28, 28)),
    "resnet18": (partial(torchvision.models.resnet18, num_classes=10), (3, 64, 64)),
    "mobilenet_v2": (partial(torchvision.models.mobilenet_v2, num_classes=10), (3, 64, 64)),
    "vit_b_32": (partial(torchvision.models.vit_b_32, num_classes=10), (3, 224, 224)),
}
#: The same for `--choice`, with the batch size.
CHOSEN: Mapping[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "MLP 64-64-64-4": (*stack.NETWORKS["MLP 64-64-64-4"], 1),
    "demo network": (*NETWORKS["demo network"], 1),
    "ViT, width 192, depth 2": (
        partial(torchvision.models.VisionTransformer, 64, 16, 2, 3, 192, 768, num_classes=10),
        (3, 64, 64),
        1,
    ),
    "mobilenet_v2": (*NETWORKS["mobilenet_v2"], 1),
}
#: Other precisions, for `_LINEAR`.
PRECISIONS: Mapping[str, Mapping[str, Any]] = {
    "bfloat16": {"dtype": torch.bfloat16},
    "int8": {"quantize": "int8"},
    "int8_dynamic": {"quantize": "int8_dynamic"},
}
#: That consists of linear layers for the most part; and those of which ensembles take minutes to
#: compile.
_LINEAR = ("ViT, width 192, depth 2",)
_FUSED_ALONE = ("ViT, width 192, depth 2", "mobilenet_v2")
#: Ways, and whose answers each must give.
MEMBER, FUSED, ENSEMBLE = "member", "fused", "ensemble"


def ways(members: list[nn.Module], fused: nn.Module, x: torch.Tensor) -> dict[str, tuple[str, Way]]:
    """What is compared: name → whose answers it gives, and how."""
    member, together = members[0], Sequential(members).eval()
    stacked = fxfuse.stack(members, x, verify=False)
    compile = partial(torch.compile, fullgraph=True, dynamic=False)
    passes = partial(fxfuse.compile, example=x, dynamic=False, strict=True)
    return {
        "member, eager": (MEMBER, member),
        "member, plain": (MEMBER, compile(_apart(member))),
        "member, passes": (MEMBER, passes(fxfuse.capture(member, _two(x)).module)),
        "fused, eager": (FUSED, fused),
        "fused, passes": (FUSED, passes(fused)),
        "sequential, eager": (ENSEMBLE, together),
        "sequential, plain": (ENSEMBLE, compile(_apart(together))),
        "sequential, passes": (ENSEMBLE, passes(fxfuse.capture(together, _two(x)).module)),
        "vmap, eager": (ENSEMBLE, through_vmap(members)),
        "stack, eager": (ENSEMBLE, stacked),
        "stack, passes": (ENSEMBLE, passes(stacked)),
    }


def _apart(module: nn.Module) -> nn.Module:
    """A copy with the same tensors: compiled, it leaves the module itself as it was."""
    tensors = chain(module.parameters(), module.buffers())
    return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})


def _two(x: torch.Tensor) -> torch.Tensor:
    """An example to capture with: a batch of two or more."""
    return torch.cat([x, x]) if len(x) < 2 else x


def measure(name: str, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """One network at one batch size."""
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    build, shape = NETWORKS[name]
    torch.manual_seed(0)
    members = [build().to(options.device).eval() for _ in range(options.members)]
    for member in members:
        # A class head of zeros, as torchvision's ViT has it, would hide every mistake.
        nn.init.normal_([m for m in member.modules() if isinstance(m, nn.Linear)][-1].weight)
    x = torch.randn(batch, *shape, device=options.device)
    fused = fxfuse.fuse(members, _two(x), verify=False).module
    row: dict[str, Any] = {"network": name, "batch": batch, "shape": list(shape)}
    with torch.no_grad():
        expected = {
            MEMBER: members[0](x),
            FUSED: fused(x),
            ENSEMBLE: torch.stack([member(x) for member in members]).mean(0),
        }
        started = time.perf_counter()
        chosen = ways(members, fused, x)
        for n, (whose, way) in chosen.items():
            error = float((way(x) - expected[whose]).abs().max() / expected[whose].abs().max())
            assert error < _TOLERANCE, (name, n, error)
        row["compiling, s"] = round(time.perf_counter() - started, 1)
        row["ms"] = race({n: way for n, (_, way) in chosen.items()}, x, options)
        if x.is_cuda:
            row["peak MiB"] = {n: _peak(way, x) for n, (_, way) in chosen.items()}
    ms = row["ms"]
    row["ratios"] = {
        "fused / member, passes": round(ms["fused, passes"] / ms["member, passes"], 3),
        "member, plain / fused, passes": round(ms["member, plain"] / ms["fused, passes"], 3),
        "best ensemble / fused, passes": round(
            min(t for n, t in ms.items() if chosen[n][0] == ENSEMBLE) / ms["fused, passes"], 3
        ),
    }
    return row


def choose(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """What is chosen for one network, against what plain `torch.compile` makes of it."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    # So that compiling is this process's own work.
    torch._inductor.config.compile_threads = 1
    build, shape, batch = CHOSEN[name]
    torch.manual_seed(0)
    members = [build().eval() for _ in range(options.members)]
    for member in members:
        nn.init.normal_([m for m in member.modules() if isinstance(m, nn.Linear)][-1].weight)
    x = torch.randn(batch, *shape)
    fused = fxfuse.fuse(members, _two(x), verify=False).module
    plain = partial(torch.compile, fullgraph=True, dynamic=False)
    passes = partial(fxfuse.compile, example=x, dynamic=False, strict=True)
    row: dict[str, Any] = {"network": name, "batch": batch, "shape": list(shape)}
    with torch.no_grad():
        ways: dict[str, Way] = {
            "fused, plain": plain(_apart(fused)),
            "fused, by rule": passes(fused, tune=False),
            "fused, chosen": passes(fused),
        }
        pairs = {
            "by rule / plain": ("fused, by rule", "fused, plain"),
            "chosen / plain": ("fused, chosen", "fused, plain"),
        }
        if name not in _FUSED_ALONE:
            together = Sequential(members).eval()
            own = {n: plain(_apart(together), backend=n) for n in ("inductor", "fxfuse")}
            took = {n: _cpu_seconds(way, x) for n, way in own.items()}
            row["compiling / plain, backend"] = round(took["fxfuse"] / took["inductor"], 3)
            stacked = fxfuse.stack(members, x, verify=False)
            ways |= {
                "ensemble, plain": own["inductor"],
                "ensemble, backend": own["fxfuse"],
                "stack, eager": stacked,
                "stack, chosen": passes(stacked),
            }
            pairs["backend / plain"] = ("ensemble, backend", "ensemble, plain")
            pairs["stack, chosen / eager"] = ("stack, chosen", "stack, eager")
            pairs["stack, chosen / plain"] = ("stack, chosen", "ensemble, plain")
        if name in _LINEAR:
            ways |= {f"fused, {n}": passes(fused, **told) for n, told in PRECISIONS.items()}
        times = measuring.race(list(ways.values()), (x,), {}, options.seconds)
    ms = row["ms"] = {n: round(took, 4) for n, took in zip(ways, times, strict=True)}
    row["ratios"] = {n: round(ms[a] / ms[b], 3) for n, (a, b) in pairs.items()}
    made = {n: way.report for n, way in ways.items() if isinstance(way, Compiled)}
    row["forms"] = {n: report.form for n, report in made.items()}
    row["errors"] = {n: report.error for n, report in made.items()}
    return row


def _cpu_seconds(way: Way, x: torch.Tensor) -> float:
    """CPU time of compiling, the C++ compiler's included, once its headers are precompiled."""
    with torch._inductor.config.patch(force_disable_caches=True):
        before = sum(os.times()[:4])
        way(x)
        return sum(os.times()[:4]) - before


def _peak(way: Way, x: torch.Tensor) -> float:
    torch.cuda.reset_peak_memory_stats()
    way(x)
    torch.cuda.synchronize()
    return round(torch.cuda.max_memory_allocated() / 2**20, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--members", type=int, default=4)
    parser.add_argument("--networks", default="", help="parts of names, separated by commas")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.3, help="of every way in every round")
    parser.add_argument("--keep", action="store_true", help="do not measure again what is there")
    parser.add_argument("--choice", action="store_true", help="what is chosen, against plain")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.json = options.json or (CHOICE if options.choice else RESULTS)
    fresh = multiprocessing.get_context("spawn")
    rows = earlier(options.json, "rows", keep=options.keep)
    if options.choice:
        parts, done = options.networks.split(","), {row["network"] for row in rows}
        for name in (n for n in CHOSEN if n not in done and any(part in n for part in parts)):
            with ProcessPoolExecutor(1, fresh) as process:
                rows.append(process.submit(choose, name, options).result())
            print(rows[-1], flush=True)
            write(options.json, {**_about(options), "rows": rows})
        return
    done = {(row["network"], row["batch"]) for row in rows}
    parts = options.networks.split(",")
    for name in (n for n in NETWORKS if any(part in n for part in parts)):
        for batch in options.batches:
            if (name, batch) in done:
                continue
            with ProcessPoolExecutor(1, fresh) as process:
                rows.append(process.submit(measure, name, batch, options).result())
            print(name, batch, rows[-1]["ms"], rows[-1]["ratios"], flush=True)
            write(options.json, {**_about(options), "rows": rows})


if __name__ == "__main__":
    main()
