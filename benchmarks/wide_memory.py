"""Peak memory of building the wide model, beside the members, each case in a process of its own.

    python benchmarks/wide_memory.py [--json FILE]

The figure to reach is the size of the result and of one member. Verification runs the wide model in
float64 as well, which takes twice its size; so both are measured.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.memory import forget_peak, peak
from benchmarks.records import versions, write

RESULTS = Path(__file__).parent / "results" / "wide_memory.json"
CASES = [("resnet18", 2), ("resnet18", 4), ("vit_b_32", 2)]


def measure(name: str, n_members: int, *, verify: bool) -> dict[str, Any]:
    """One fusion of torchvision's networks at width N, in this process."""
    import torchvision

    import fxfuse

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    members = [getattr(torchvision.models, name)().eval() for _ in range(n_members)]
    x = torch.randn(2, 3, 224, 224)
    small = [torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)) for _ in range(2)]
    # What is loaded with the first fusion is no memory of this one.
    fxfuse.fuse(small, torch.randn(3, 3), size=2)
    forget_peak()
    before = peak()
    module = fxfuse.fuse(members, x, verify=verify, size=n_members).module
    most = peak() - before
    member, result = _megabytes(members[0]), _megabytes(module)
    return {
        "model": name,
        "members": n_members,
        "verified": verify,
        "member_mb": member,
        "result_mb": result,
        "peak_mb": round(most, 1),
        "over_own_and_member": round(most / (member + result), 3),
    }


def _megabytes(module: torch.nn.Module) -> float:
    tensors = module.state_dict().values()
    return round(sum(t.numel() * t.element_size() for t in tensors) / 1e6, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--case", help="measured here, for the process that measures one case")
    options = parser.parse_args()
    if options.case:
        name, n_members, verify = json.loads(options.case)
        print(json.dumps(measure(name, n_members, verify=verify)))
        return
    rows = []
    for name, n_members in CASES:
        for verify in (False, True):
            case = json.dumps([name, n_members, verify])
            command = [sys.executable, __file__, "--case", case]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(json.dumps(rows[-1]), flush=True)
    write(options.json, {"versions": versions(), "threads": 1, "rows": rows})


if __name__ == "__main__":
    main()
