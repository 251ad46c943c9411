"""Where the CPU time and the memory of `fuse`, `refit`, `match` and `stack` go.

    python -m benchmarks.profiles spliceai:transplant resnet34:refit ... [--data-root FOLDER]
        [--json FILE] [--label before] [--top 20]

Each case has a process of its own, on one thread, and is sampled by a timer of CPU time: what has
passed since the last sample belongs to the innermost function of fxfuse on the stack (*self*), and
to all of them (*total*). Memory is the most that was resident beyond what there was before. A
refit is compared with the members' own forward passes on the same inputs, in the same process.
Members have random weights with calibrated statistics, but for SpliceAI, whose published weights
the package spliceai holds: what a network knows does not change what it costs.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torchvision
from torch import nn

import fxfuse
from benchmarks.memory import forget_peak, peak
from benchmarks.real import spliceai
from benchmarks.records import described, earlier, write
from fxfuse import Calibration, Match, Transplant
from fxfuse.refine import refit
from tests.models import excite

RESULTS = Path(__file__).parent / "results" / "profiles.json"
PACKAGE = str(Path(fxfuse.__file__).parent)
STEPS = ("transplant", "obs", "refit", "match", "stack")
#: Seconds of CPU time between samples.
_INTERVAL = 0.005
#: CPU seconds of matching.
_MATCHING = 10.0


class Sampler:
    """Samples what fxfuse is doing, by CPU time.

    Attributes:
        own: CPU seconds by innermost function of fxfuse.
        total: CPU seconds by function, with all that it calls.
    """

    def __init__(self) -> None:
        self.own, self.total = Counter[str](), Counter[str]()
        self._last = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Sample while the block runs."""
        self._last = time.process_time()
        before = signal.signal(signal.SIGPROF, lambda _, frame: self._sample(frame))
        signal.setitimer(signal.ITIMER_PROF, _INTERVAL, _INTERVAL)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.signal(signal.SIGPROF, before)

    def _sample(self, frame: FrameType | None) -> None:
        # An operator of torch may run for long, and the signal waits for its end.
        now = time.process_time()
        passed, self._last = now - self._last, now
        names: list[str] = []
        while frame is not None:
            code = frame.f_code
            if code.co_filename.startswith(PACKAGE):
                path = Path(code.co_filename).relative_to(PACKAGE).with_suffix("")
                names.append(f"{path.as_posix()}:{code.co_qualname}")
            frame = frame.f_back
        self.own[names[0] if names else "elsewhere"] += passed
        for name in set(names):
            self.total[name] += passed

    def most(self, count: int) -> dict[str, dict[str, float]]:
        """The functions with most CPU seconds."""
        return {
            kind: {name: round(s, 2) for name, s in found.most_common(count)}
            for kind, found in (("self", self.own), ("total", self.total))
        }


def images(count: int, size: int) -> Callable[[str], torch.Tensor]:
    """Random images."""
    return lambda _: torch.randn(count, 3, size, size)


def of_torchvision(name: str, count: int) -> Callable[[torch.Tensor], list[nn.Module]]:
    """Members of torchvision with random weights."""

    def build(inputs: torch.Tensor) -> list[nn.Module]:
        made = getattr(torchvision.models, name)
        return [excite(made(num_classes=10), inputs[:8]) for _ in range(count)]

    return build


#: Name → its inputs, its members, and the inputs of an example.
NETWORKS: Mapping[
    str,
    tuple[Callable[[str], torch.Tensor], Callable[[torch.Tensor], Sequence[nn.Module]], int],
] = {
    "resnet18": (images(256, 64), of_torchvision("resnet18", 2), 2),
    "resnet34": (images(100, 224), of_torchvision("resnet34", 2), 2),
    "resnet50": (images(100, 224), of_torchvision("resnet50", 2), 2),
    "vit_b_32": (images(100, 224), of_torchvision("vit_b_32", 2), 2),
    "spliceai": (
        lambda root: spliceai.calibration_windows(Path(root))[:100],
        lambda _: spliceai.members(),
        2,
    ),
}


def run(network: str, step: str, options: argparse.Namespace) -> dict[str, Any]:
    """One case, in this process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    load, build, batch = NETWORKS[network]
    inputs = load(options.data_root)
    if options.inputs:
        inputs = inputs[: options.inputs]
    members = list(build(inputs))
    example = inputs[:batch].clone()
    given = Calibration(inputs, augmentations=0, held_out=0)
    row: dict[str, Any] = {"network": network, "step": step, "members": len(members)}
    raw = None
    if step in ("refit", "match"):
        raw = fxfuse.fuse(members, example, verify=False)
        row["inputs"] = len(inputs)
        start = time.process_time()
        with torch.no_grad():
            for member in members:
                for part in inputs.split(batch):
                    member(part)
        row["forward_cpu_s"] = round(time.process_time() - start, 2)
    calls: dict[str, Callable[[], Any]] = {
        "transplant": lambda: fxfuse.fuse(members, example),
        "obs": lambda: fxfuse.fuse(
            members,
            example,
            method=Transplant(score="obs"),
            calibration=given,
            refine=[],
            verify=False,
        ),
        "refit": lambda: raw and refit(raw, members, given),
        "match": lambda: fxfuse.fuse(
            members, example, calibration=inputs, refine=[Match(seconds=_MATCHING)], verify=False
        ),
        "stack": lambda: fxfuse.stack(members, example),
    }
    forget_peak()
    before, sampler = peak(), Sampler()
    start = time.process_time()
    with sampler.running():
        result = calls[step]()
    row["cpu_s"] = round(time.process_time() - start, 2)
    row["peak_mb"] = round(peak() - before)
    if step == "refit":
        row["over forward"] = round(row["cpu_s"] / row["forward_cpu_s"], 2)
        row["report"] = str(result)
    return row | sampler.most(options.top)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="+", metavar="network:step", help=f"{', '.join(NETWORKS)}")
    parser.add_argument("--data-root", default="../shared/data")
    parser.add_argument("--inputs", type=int, help="fewer calibration inputs")
    parser.add_argument("--top", type=int, default=20, help="functions that are shown")
    parser.add_argument("--label", default="", help="what tells this run from others")
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        network, step = options.cases[0].split(":")
        print(json.dumps(run(network, step, options)))
        return
    more = ["--top", str(options.top), "--data-root", options.data_root]
    more += ["--inputs", str(options.inputs)] if options.inputs else []
    for case in options.cases:
        command = [sys.executable, "-m", "benchmarks.profiles", case, "--here", *more]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        row = {"label": options.label, "commit": described()}
        row |= json.loads(done.stdout.strip().splitlines()[-1])
        print(json.dumps(row, indent=1), flush=True)
        keys = ("label", "network", "step", "inputs")
        rows = earlier(options.json, "rows", keep=True)
        rows = [r for r in rows if any(r.get(key) != row.get(key) for key in keys)]
        write(options.json, {"torch": torch.__version__, "threads": 1, "rows": [*rows, row]})


if __name__ == "__main__":
    main()
