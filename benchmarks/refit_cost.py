"""What a refit costs: torchvision's resnet18 at 64 x 64 with 256 calibration images.

    python benchmarks/refit_cost.py [--images 256] [--size 64] [--members 2] [--json FILE]

Members have random weights with calibrated statistics: the cost does not depend on what they know.
Reports CPU and wall seconds of the selection (`obs`) and of the refit, and the peak of resident
memory over that of the process before. The ratio to a forward pass of the members and the fused
network on the same images says what the regressions add.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torchvision

sys.path.insert(0, str(Path(__file__).parents[1]))

import fxfuse
from fxfuse import Transplant
from fxfuse.refine import refit
from tests.models import excite
from tests.options import flat

RESULTS = Path(__file__).parent / "results" / "refit_cost.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--members", type=int, default=2)
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.manual_seed(0)
    images = torch.randn(options.images, 3, options.size, options.size)
    members = [
        excite(torchvision.models.resnet18(num_classes=10), images[:32])
        for _ in range(options.members)
    ]
    before = _peak_gb()
    forward = _timed(lambda: [_forward(m, images) for m in [*members, members[0]]])
    row: dict[str, Any] = {"forward": forward}
    fused: list[fxfuse.FusionResult] = []

    def fuse(**more: Any) -> None:
        fused.append(fxfuse.fuse(members, images[:2], verify=False, **flat(**more)))

    row["fuse, l2"] = _timed(fuse)
    row["fuse, obs"] = _timed(
        lambda: fuse(calibration=images, method=Transplant(score="obs"), refine=[])
    )
    row["refit"] = _timed(lambda: refit(fused[-1], members, images))
    row["refit over forward"] = round(row["refit"]["cpu_s"] / forward["cpu_s"], 1)
    row["peak_gb"] = round(_peak_gb(), 2)
    row["peak_over_start_gb"] = round(_peak_gb() - before, 2)
    content = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "images": options.images,
        "size": options.size,
        "members": options.members,
        **row,
    }
    print(json.dumps(content, indent=1))
    options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _forward(model: torch.nn.Module, images: torch.Tensor) -> None:
    with torch.no_grad():
        for batch in images.split(128):
            model(batch)


def _timed(function: Any) -> dict[str, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    return {
        "cpu_s": round(time.process_time() - cpu, 2),
        "wall_s": round(time.perf_counter() - wall, 2),
    }


def _peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    main()
