"""Time of the analysis against the number of nodes: a ResNet of growing depth.

    python benchmarks/analysis_growth.py [--json benchmarks/results/analysis_growth.json]

Medians over the repetitions; the analysis starts from the captured graph.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from torchvision.models.resnet import Bottleneck, ResNet

sys.path.insert(0, str(Path(__file__).parents[1]))

import fxfuse

BLOCKS = (4, 8, 16, 32, 64, 128)


def measure(blocks: int, repetitions: int) -> dict[str, float]:
    model = ResNet(Bottleneck, [blocks // 4] * 4, num_classes=10).eval()
    start = time.perf_counter()
    captured = fxfuse.capture(model, torch.randn(2, 3, 64, 64))
    capture_s = time.perf_counter() - start
    seconds = []
    for _ in range(repetitions):
        start = time.perf_counter()
        fxfuse.analyze(captured)
        seconds.append(time.perf_counter() - start)
    return {
        "blocks": blocks,
        "nodes": len(captured.graph.nodes),
        "capture_s": round(capture_s, 3),
        "analysis_s": round(statistics.median(seconds), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repetitions", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    measure(BLOCKS[0], 1)  # warms up
    rows = []
    for blocks in BLOCKS:
        rows.append(measure(blocks, options.repetitions))
        print(rows[-1])
    if options.json:
        result = {"torch": torch.__version__, "repetitions": options.repetitions, "rows": rows}
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
