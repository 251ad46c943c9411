"""Time of the analysis of a network against the time of its torch.export, in one run.

    python benchmarks/analysis_time.py [--json benchmarks/results/analysis_time.json]

Both are medians over the repetitions; the analysis starts from the captured graph.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
import torchvision

import fxfuse

NETWORKS = ("resnet18", "resnet50", "densenet121", "mobilenet_v3_small", "vit_b_32", "swin_t")


def measure(name: str, repetitions: int) -> dict[str, object]:
    model = getattr(torchvision.models, name)().eval()
    x = torch.randn(2, 3, 224, 224)
    shapes = ({0: torch.export.Dim.DYNAMIC},)
    exports, analyses = [], []
    program = fxfuse.capture(model, x)  # warms both up
    for _ in range(repetitions):
        start = time.perf_counter()
        torch.export.export(model, (x,), dynamic_shapes=shapes, strict=False)
        middle = time.perf_counter()
        fxfuse.analyze(program)
        exports.append(middle - start)
        analyses.append(time.perf_counter() - middle)
    export, analysis = statistics.median(exports), statistics.median(analyses)
    return {
        "network": name,
        "export_s": round(export, 3),
        "analysis_s": round(analysis, 3),
        "ratio": round(analysis / export, 3),
        "repetitions": repetitions,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repetitions", type=int, default=5)
    options = parser.parse_args()
    rows = []
    print(f"{'network':22}{'torch.export':>14}{'analysis':>12}{'ratio':>8}")
    for name in NETWORKS:
        row = measure(name, options.repetitions)
        rows.append(row)
        print(f"{name:22}{row['export_s']:>12} s{row['analysis_s']:>10} s{row['ratio']:>8}")
    if options.json:
        result = {"torch": torch.__version__, "rows": rows}
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
