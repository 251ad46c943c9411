"""Accuracy against cost: fused networks of every width, and the best member pruned as narrow.

    python -m benchmarks.width [--network vgg ...] [--setting specialists] [-n 2 4] [--seeds 3]
        [--keep] [--json benchmarks/results/width.json]

Rows: at each width (in units of a member, up to N) units chosen by `obs` and refitted (no step),
and that network after 160 steps of matching. Controls: the member that validates best, pruned by
torch-pruning (group L2 magnitude, all layers alike, the last one kept) to the same width, and
matched to the same ensemble for as many steps; at width 1 it is not pruned. All see the same at
most 1,000 unlabelled training inputs; matching has its defaults. Validation data chooses the best
member, test data reports. The JSON is written case by case; `width_table.py` makes the
page of it.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import itertools
import platform
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch_pruning
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fxfuse
from benchmarks.paper.datasets import load
from benchmarks.paper.matching import PLACES
from benchmarks.paper.networks import NETWORKS
from benchmarks.paper.setting import SETTINGS, Case, accuracy, case
from benchmarks.records import described, earlier, write
from fxfuse import Match, Refit, Transplant
from fxfuse.refine import match
from fxfuse.transform.cost import operations_of, parameters_of

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "width.json"
WIDTHS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
CALIBRATION, STEPS, BATCH = 1000, 160, 64
REFITTED, MATCHED = "obs + refit", "obs + refit + matching"
PRUNED, PRUNED_MATCHED = "pruned best member", "pruned best member + matching"
MEMBER, MEMBER_MATCHED, ENSEMBLE = "best member", "best member + matching", "ensemble"


class Teacher(nn.Module):
    """An ensemble that remembers its answers: every network is matched on the same pool."""

    def __init__(self, ensemble: nn.Module) -> None:
        super().__init__()
        self.ensemble = ensemble
        self._answers: dict[bytes, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        """[b, *] → [b, k], the mean of the members' logits."""
        key = hashlib.blake2b(x.contiguous().numpy().tobytes()).digest()
        if key not in self._answers:
            self._answers[key] = self.ensemble(x).detach()
        return self._answers[key]


def measure(made: Case) -> list[dict[str, Any]]:
    """Test accuracy in percent, parameters and operations for one input, of every row."""
    x = made.calibration
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(made.seed))
    x, n = x[order[:CALIBRATION]], len(made.members)
    teacher = Teacher(made.ensemble)
    rows: list[dict[str, Any]] = []

    def note(name: str, width: float, module: nn.Module, parameters: int, flops: int) -> None:
        score = accuracy(module, *made.test)
        told = {"row": name, "width": width, "accuracy": score}
        rows.append({**told, "parameters": parameters, "flops": flops})

    def matched(module: nn.Module) -> nn.Module:
        match(module, [teacher], x, Match(steps=STEPS, batch=BATCH, seed=made.seed))
        return module

    # Capturing is no part of fusing: it is done once, whatever follows.
    program = [fxfuse.capture(member, x[:2]) for member in made.members]
    own = _cost(made.best, x)
    note(MEMBER, 1.0, made.best, *own)
    note(ENSEMBLE, float(n), made.ensemble, *(n * amount for amount in own))
    note(MEMBER_MATCHED, 1.0, matched(copy.deepcopy(made.best)), *own)
    for width in sorted({*WIDTHS, float(n)}):
        result = fxfuse.fuse(
            program,
            calibration=x,
            verify=False,
            method=Transplant(score="obs"),
            size=width,
            refine=[Refit()],
        )
        sizes = result.plan.sizes()
        # Operations are counted for the example, which is two inputs.
        operations = operations_of(result.graph, sizes)
        assert operations is not None
        cost = parameters_of(result.graph, sizes), operations // 2
        note(REFITTED, width, result.module, *cost)
        note(MATCHED, width, matched(result.module), *cost)
        if width < 1:
            module = pruned(made.best, width, x)
            cost = _cost(module, x)
            note(PRUNED, width, module, *cost)
            note(PRUNED_MATCHED, width, matched(module), *cost)
    return rows


def pruned(member: nn.Module, width: float, inputs: Tensor) -> nn.Module:
    """A copy of a network with a part of the channels of every layer but the last."""
    module = copy.deepcopy(member)
    pruner = torch_pruning.pruner.BasePruner(
        module,
        inputs[:2],
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=1 - width,
        ignored_layers=[module.head],
    )
    pruner.step()
    return module.eval()


def _cost(module: nn.Module, inputs: Tensor) -> tuple[int, int]:
    """Parameters, and floating-point operations for one input."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        module(inputs[:1])
    return sum(p.numel() for p in module.parameters()), counter.get_total_flops()


def conditions() -> dict[str, Any]:
    """What a measurement was made with."""
    packages = ("torch", "torch-pruning", "numpy", "scipy")
    return {
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in packages},
        "device": "cpu",
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "commit": described(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", nargs="+", choices=NETWORKS, default=["mlp", "vgg", "resnet"])
    parser.add_argument("--setting", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("-n", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--keep", action="store_true", help="do not measure again what is there")
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    # Of the code that runs, whatever becomes of the working tree meanwhile.
    told = conditions()
    cases = earlier(options.json, "cases", keep=options.keep)
    done = {(c["network"], c["setting"], c["n"], c["seed"]) for c in cases}
    wanted = itertools.product(range(options.seeds), options.n, options.network, options.setting)
    for seed, n, network, setting in wanted:
        key = (network, setting, n, seed)
        if key in done:
            continue
        data = PLACES[setting][network]
        rows = measure(case(network, load(data), setting, n, seed))
        about = {"network": network, "data": data, "setting": setting, "n": n, "seed": seed}
        cases.append({**about, "conditions": told, "rows": rows})
        content = {
            "schema": 1,
            "steps": STEPS,
            "batch": BATCH,
            "calibration": CALIBRATION,
            "cases": cases,
        }
        write(options.json, content)
        shown = {f"{r['row']} {r['width']:g}": round(r["accuracy"], 1) for r in rows}
        print(key, shown, flush=True)


if __name__ == "__main__":
    main()
