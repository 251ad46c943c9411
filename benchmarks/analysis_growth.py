"""Time and memory of the analysis against the number of nodes: a ResNet of growing depth.

    python -m benchmarks.analysis_growth [--json benchmarks/results/analysis_growth.json]

Each depth runs in a process of its own. *Export* is `torch.export` alone, *capture* all of
`fxfuse.capture`; the analysis starts from what was captured. Seconds are the process's, on one
thread: of the analysis medians over the repetitions, of export and capture one run after a small
network. Memory is the most resident memory beyond what there was before; freed memory is given back
first.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torchvision.models.resnet import Bottleneck, ResNet

import fxfuse
from benchmarks.memory import forget_peak, peak
from benchmarks.records import write
from fxfuse.cli.demo.environment import environment
from fxfuse.graph.capture import export

RESULTS = Path(__file__).parent / "results" / "analysis_growth.json"
BLOCKS = (4, 8, 16, 32, 64, 128)


def network(blocks: int) -> tuple[ResNet, torch.Tensor]:
    """A network of so many blocks, and an input for it."""
    return ResNet(Bottleneck, [blocks // 4] * 4, num_classes=10).eval(), torch.randn(2, 3, 64, 64)


def cost(call: Callable[[], Any]) -> tuple[Any, float, float]:
    """What a call returns, its CPU seconds, and the megabytes that it needed at most."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    forget_peak()
    before, start = peak(), time.process_time()
    value = call()
    return value, time.process_time() - start, peak() - before


def measure(blocks: int, repetitions: int) -> dict[str, float]:
    """The row of one depth."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    fxfuse.analyze(fxfuse.capture(*network(BLOCKS[0])))
    model, x = network(blocks)
    _, export_s, export_mb = cost(lambda: export(model, (x,), {}, None))
    program, capture_s, _ = cost(lambda: fxfuse.capture(model, x))
    _, first, analysis_mb = cost(lambda: fxfuse.analyze(program))
    others = [cost(lambda: fxfuse.analyze(program))[1] for _ in range(repetitions - 1)]
    return {
        "blocks": blocks,
        "nodes": len(program.graph.nodes),
        "export_s": round(export_s, 3),
        "capture_s": round(capture_s, 3),
        "analysis_s": round(statistics.median([first, *others]), 4),
        "export_mb": round(export_mb, 1),
        "analysis_mb": round(analysis_mb, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--case", type=int, help="one number of blocks, printed as JSON")
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(options.case, options.repetitions)))
        return
    rows = []
    for blocks in BLOCKS:
        command = [sys.executable, "-m", "benchmarks.analysis_growth", "--case", str(blocks)]
        command += ["--repetitions", str(options.repetitions)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1], flush=True)
    about = {"environment": environment(), "repetitions": options.repetitions}
    write(options.json, {**about, "rows": rows})


if __name__ == "__main__":
    main()
