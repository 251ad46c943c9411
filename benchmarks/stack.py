"""A stack against its members one after the other and against vmap, eager and compiled, in one run.

    python benchmarks/stack.py [--device cpu] [--members 4] [--networks mlp,vit] [--no-compile]
                               [--rounds 15] [--seconds 0.3] [--json FILE]

Every one of the ways returns the mean of the members' outputs and is first compared with the
members. Times are taken in rounds in which every way has its turn (`torch.utils.benchmark`), so
that what disturbs the machine disturbs all of them; reported is the median over the rounds. Random
weights: what a network knows does not change how long it takes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn
from torch.func import functional_call, stack_module_state
from torch.utils.benchmark import Timer

sys.path.insert(0, str(Path(__file__).parents[1]))

import fxfuse
from benchmarks.records import on_device
from fxfuse.cli.demo.environment import environment
from fxfuse.common.output import write_json

RESULTS = Path(__file__).parent / "results" / "stack.json"
BATCHES = (1, 16)
#: Outputs of float32 networks may differ by so much, relative to the largest.
_TOLERANCE = 1e-4

Way = Callable[[torch.Tensor], torch.Tensor]


def mlp() -> nn.Module:
    hidden = [nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(512, 10))


def small_mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)
    )


#: Name → how a member is built, and the shape of one example.
NETWORKS: Mapping[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "MLP 64-64-64-4": (small_mlp, (64,)),
    "MLP 784-512-512-10": (mlp, (1, 28, 28)),
    "ViT, width 192, depth 6": (
        partial(torchvision.models.VisionTransformer, 64, 16, 6, 3, 192, 768, num_classes=10),
        (3, 64, 64),
    ),
    "resnet18": (partial(torchvision.models.resnet18, num_classes=10), (3, 64, 64)),
    "mobilenet_v2": (partial(torchvision.models.mobilenet_v2, num_classes=10), (3, 64, 64)),
}


class Sequential(nn.Module):
    """The members one after the other."""

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([member(x) for member in self.members]).mean(0)


def through_vmap(members: Sequence[nn.Module]) -> Way:
    """The members as torch's own vectorisation runs them."""
    state = stack_module_state(list(members))
    template = members[0]

    def member(tensors: Any, x: torch.Tensor) -> torch.Tensor:
        return functional_call(template, tensors, (x,))

    mapped = torch.vmap(member, in_dims=(0, None), randomness="different")
    return lambda x: mapped(state, x).mean(0)


def ways(members: Sequence[nn.Module], x: torch.Tensor) -> dict[str, Way]:
    """What is compared, by name."""
    return {
        "sequential": Sequential(members).eval(),
        "vmap": through_vmap(members),
        "stack": fxfuse.stack(members, x, verify=False),
    }


def measure(name: str, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """One network at one batch size."""
    build, shape = NETWORKS[name]
    torch.manual_seed(0)
    members = [build().to(options.device).eval() for _ in range(options.members)]
    for member in members:
        # A class head of zeros, as torchvision's ViT has it, would hide every mistake.
        nn.init.normal_([m for m in member.modules() if isinstance(m, nn.Linear)][-1].weight)
    x = torch.randn(batch, *shape, device=options.device)
    row: dict[str, Any] = {"network": name, "batch": batch, "shape": list(shape)}
    for mode in ("eager", "compiled")[: 1 if options.no_compile else 2]:
        torch._dynamo.reset()
        chosen = ways(members, x)
        if mode == "compiled":
            chosen = {n: torch.compile(way, fullgraph=True) for n, way in chosen.items()}
        with torch.no_grad():
            started = time.perf_counter()
            answers = {n: way(x) for n, way in chosen.items()}
            row[f"{mode} first call, s"] = round(time.perf_counter() - started, 1)
            expected = torch.stack([member(x) for member in members]).mean(0)
            for n, answer in answers.items():
                error = float((answer - expected).abs().max() / expected.abs().max())
                assert error < _TOLERANCE, (name, mode, n, error)
            row[mode] = race(chosen, x, options)
        best = min(row[mode]["sequential"], row[mode]["vmap"])
        row[f"{mode} ratio"] = round(row[mode]["stack"] / best, 3)
    fastest = [row[mode] for mode in ("eager", "compiled") if mode in row]
    best = min(times[n] for times in fastest for n in ("sequential", "vmap"))
    row["ratio"] = round(min(times["stack"] for times in fastest) / best, 3)
    return row


def race(
    chosen: Mapping[str, Way], x: torch.Tensor, options: argparse.Namespace
) -> dict[str, float]:
    """Median time of each way in milliseconds."""
    timers = {n: Timer("way(x)", globals={"way": way, "x": x}) for n, way in chosen.items()}
    runs = {}
    for n, timer in timers.items():
        once = timer.timeit(2).mean
        runs[n] = max(1, round(options.seconds / once))
    times: dict[str, list[float]] = {n: [] for n in timers}
    for _ in range(options.rounds):
        for n, timer in timers.items():
            times[n].append(timer.timeit(runs[n]).mean * 1e3)
    return {n: round(statistics.median(found), 4) for n, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--members", type=int, default=4)
    parser.add_argument("--networks", help="parts of names, separated by commas")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=0.3, help="of every way in every round")
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = []
    parts = (options.networks or "").split(",")
    for name in (n for n in NETWORKS if any(part in n for part in parts)):
        for batch in BATCHES:
            row = measure(name, batch, options)
            rows.append(row)
            print(row, flush=True)
            write_json(options.json, {**_about(options), "rows": rows})


def _about(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "environment": {**environment(), "torchvision": torchvision.__version__},
        **on_device(options.device),
        "members": options.members,
        "rounds": options.rounds,
        "seconds": options.seconds,
    }


if __name__ == "__main__":
    main()
