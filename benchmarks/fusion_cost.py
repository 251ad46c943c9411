"""What fusing costs: seconds and peak memory, against copying the bytes and against the others.

    python -m benchmarks.fusion_cost [--networks mlp512,resnet50] [--members 2 8] [--keep]
        [--device cpu] [--memory 16] [--seconds 300] [--json FILE]

Each case runs in a process of its own, on one thread; the members lie in `.safetensors` files that
another process wrote. Ways:

- *copy*: every tensor of every member, loaded, is cloned: the limit.
- *transplant*: scores, plan and gather, members loaded (`l2`, the members' size); without capture
  and analysis.
- *streamed*: the same from the files, one tensor in memory at a time; reading is in the time.
- *average*: index by index, members loaded.
- *transport*: exact optimal transport (POT), members loaded.
- *reference*: the members concatenated into a wide network, which torch-pruning prunes.
- *whole*: `fxfuse.fuse` from loaded members: capture, analysis, scores, gather, oracles.

Seconds are the least of three for what takes below ten, from and to an idle device. Memory is the
most resident memory of the process beyond what it had after the imports, files mapped into it
included; on CUDA it is the most that was allocated there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import nn

import fxfuse
from benchmarks.memory import forget_peak, peak
from benchmarks.records import earlier, on_device, versions, write
from fxfuse.cli.demo.environment import environment
from fxfuse.members.streamed import first_member, streamed_states
from fxfuse.transform.apply import fused_tensors
from fxfuse.verify.parity import concatenated_and_pruned
from tests.options import planned

RESULTS = Path(__file__).parent / "results" / "fusion.json"
WAYS = ("copy", "transplant", "streamed", "average", "transport", "reference", "whole")
MEMBERS = (2, 4, 8, 64)
#: Repeated where once takes less than so many seconds.
_SHORT = 10.0
_REPEATS = 3


def mlp(width: int) -> nn.Module:
    hidden = [nn.Linear(3072, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Linear(width, 10))


#: Name → how a member is built, and its example.
NETWORKS: Mapping[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    **{f"mlp{w}": (partial(mlp, w), (3072,)) for w in (512, 1024, 2048, 4096, 8192)},
    "resnet18": (torchvision.models.resnet18, (3, 64, 64)),
    "resnet50": (torchvision.models.resnet50, (3, 64, 64)),
    "vgg16_bn": (torchvision.models.vgg16_bn, (3, 64, 64)),
    "vit_b_32": (partial(torchvision.models.vit_b_32, image_size=64), (3, 64, 64)),
}


def run(name: str, n: int, way: str, folder: Path, device: torch.device) -> dict[str, Any]:
    """One case, in this process."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    build, shape = NETWORKS[name]
    x = torch.randn(2, *shape, device=device)
    paths = [folder / f"{i}.safetensors" for i in range(n)]
    base = _begin(device)
    with torch.device("meta"):
        template = build()
    if any(b.is_meta for b in template.buffers()):
        template = build()
    member = first_member(template, paths[0]).eval().to(device)
    if way == "whole":
        members = [first_member(template, path).eval().to(device) for path in paths]
        seconds = _timed(lambda: fxfuse.fuse(members, x), device)
        return {"seconds": seconds, "megabytes": _most(device) - base}
    program = fxfuse.capture(member, x)
    graph = fxfuse.analyze(program)
    streams = way == "streamed"
    read = partial(load_file, device=str(device))
    loaded = None if streams else [program.state(), *map(read, paths[1:])]

    def fused(method: str, score: str = "l2") -> None:
        states = loaded or streamed_states(paths, program)
        plan = planned(graph, states, method, score)
        fused_tensors(graph, plan, states)

    seconds = _timed(
        {
            "copy": lambda: [t.clone() for state in loaded or () for t in state.values()],
            "transplant": partial(fused, "transplant"),
            "streamed": partial(fused, "transplant"),
            "average": partial(fused, "average"),
            "transport": partial(fused, "optimal_transport"),
            "reference": lambda: concatenated_and_pruned(member, graph, loaded or (), (x,), 2),
        }[way],
        device,
    )
    return {"seconds": seconds, "megabytes": _most(device) - base}


def _begin(device: torch.device) -> float:
    """Begins to watch memory; returns what is in use, in MB."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        forget_peak()
    return _most(device)


def _most(device: torch.device) -> float:
    """Most memory since the beginning, in MB."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 1e6, 1)
    return peak()


def _timed(call: Callable[[], Any], device: torch.device) -> float:
    times: list[float] = []
    while not times or (times[0] < _SHORT and len(times) < _REPEATS):
        start = _now(device)
        call()
        times.append(_now(device) - start)
    return round(min(times), 4)


def _now(device: torch.device) -> float:
    """Seconds, once the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def written(name: str, n: int, folder: Path) -> int:
    """Writes members with random weights; returns their bytes."""
    build, _ = NETWORKS[name]
    for number in range(n):
        torch.manual_seed(number)
        save_file(build().state_dict(), folder / f"{number}.safetensors")
    return sum(path.stat().st_size for path in folder.iterdir())


def measure(name: str, n: int, options: argparse.Namespace) -> dict[str, Any]:
    """One network with one number of members, every way."""
    row: dict[str, Any] = {"network": name, "n": n, "ways": {}}
    with tempfile.TemporaryDirectory() as work:
        row["megabytes"] = round(written(name, n, Path(work)) / 1e6, 1)
        for way in options.ways:
            # What needs all members in memory, several times over, is not tried beyond it.
            need = {"streamed": 3 / n, "reference": 3.0 * n, "copy": 2, "whole": 4}.get(way, 2.5)
            if row["megabytes"] * need > options.memory * 1000:
                row["ways"][way] = {"left": f"needs more than {options.memory:g} GB"}
                continue
            if way == "transport" and name not in ("mlp512", "mlp1024"):
                continue
            command = [sys.executable, "-m", "benchmarks.fusion_cost", "--case"]
            try:
                done = subprocess.run(
                    [*command, name, str(n), way, work, options.device],
                    capture_output=True,
                    text=True,
                    timeout=options.seconds,
                    check=False,
                )
            except subprocess.TimeoutExpired:
                row["ways"][way] = {"left": f"took longer than {options.seconds:g} s"}
                continue
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["killed"])[-1]
                row["ways"][way] = {"left": f"failed: {last}"}
            else:
                row["ways"][way] = json.loads(done.stdout.strip().splitlines()[-1])
    return row


def main() -> None:
    if "--case" in sys.argv:
        name, n, way, folder, device = sys.argv[sys.argv.index("--case") + 1 :]
        print(json.dumps(run(name, int(n), way, Path(folder), torch.device(device))))
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--members", type=int, nargs="+", default=MEMBERS)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--memory", type=float, default=16, help="GB")
    parser.add_argument("--disk", type=float, default=12, help="GB for the members' files")
    parser.add_argument("--seconds", type=float, default=300, help="for each case")
    parser.add_argument("--keep", action="store_true", help="do not measure again what is there")
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows = earlier(options.json, "rows", keep=options.keep)
    done = {(row["network"], row["n"]) for row in rows}
    for name in options.networks:
        with torch.device("meta"):
            size = sum(p.numel() * p.element_size() for p in NETWORKS[name][0]().parameters())
        for n in options.members:
            if (name, n) in done or n * size > options.disk * 1e9:
                continue
            rows.append(measure(name, n, options))
            print(json.dumps(rows[-1]), flush=True)
            about = {"versions": versions(), "environment": environment(), "threads": 1}
            about |= on_device(options.device)
            write(options.json, {**about, "rows": rows})


if __name__ == "__main__":
    main()
