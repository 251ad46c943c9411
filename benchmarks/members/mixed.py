"""Members of three architectures in one network of the first one's, without labels.

    python -m benchmarks.members.mixed digits [--seeds 0 1 2] [--steps 200]
    python -m benchmarks.members.mixed cifar10 [--seeds 0] [--seconds 120] [--data-root DATA]

`digits` trains its members here, in seconds: a residual network, a plain convolutional one and a
perceptron on scikit-learn's digits; `same` have seen all classes, `specialists` five of ten each.
`cifar10` takes the weights that `benchmarks.members.train` keeps: ResNet-20, VGG-11 and ConvMixer.
Calibration inputs have no labels, and no member was trained on them. Test images are looked at
once, after everything was chosen.

The share of the way is (result - base member) / (ensemble - base member), in accuracy. The control
is what a user would write: the base member distilled for as many CPU seconds.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

import fxfuse
from benchmarks import pages, records
from benchmarks.members.cifar10 import load
from benchmarks.members.train import kept
from benchmarks.real.controls import accuracy, distil, kl, mean_of, outputs_of

ROOT = Path(__file__).resolve().parents[2]
RESULTS, PAGE = ROOT / "benchmarks/results/mixed.json", ROOT / "docs/how-to/different-members.md"
_CIFAR10 = ("resnet20", "vgg11", "convmixer")
_BATCH = 500
#: Of the digits' classes, those that each specialist has seen.
_KNOWN = ((0, 1, 2, 3, 4), (5, 6, 7, 8, 9), (0, 2, 4, 6, 8))


class Residual(nn.Module):
    """A residual block with BatchNorm, and a mean over all pixels."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.conv3, self.norm3 = nn.Conv2d(width, 2 * width, 3, 2, 1), nn.BatchNorm2d(2 * width)
        self.linear = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """[b, 1, 8, 8] → logits [b, 10]."""
        x = self.norm1(self.conv1(x)).relu()
        x = (x + self.norm2(self.conv2(x))).relu()
        return self.linear(self.norm3(self.conv3(x)).relu().mean((2, 3)))


def _plain() -> nn.Module:
    pool = [nn.ReLU(), nn.MaxPool2d(2)]
    layers = [nn.Conv2d(1, 16, 3, padding=1), *pool, nn.Conv2d(16, 32, 3, padding=1), *pool]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128, 10))


def _perceptron() -> nn.Module:
    layers = [nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(32, 10))


@dataclass(frozen=True)
class Case:
    """Members, calibration inputs `[n, *]` and test images with their labels."""

    setting: str
    seed: int
    members: Sequence[nn.Module]
    given: Tensor
    inputs: Tensor
    labels: Tensor


def main() -> None:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("data", choices=("digits", "cifar10"))
    made.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    made.add_argument("--steps", type=int, default=200, help="of matching, on the digits")
    made.add_argument("--seconds", type=float, default=120.0, help="of matching, on CIFAR-10")
    made.add_argument("--calibration", type=int, default=1000, help="CIFAR-10 inputs")
    made.add_argument("--data-root", type=Path, default=Path("../shared/data"))
    options = made.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", UserWarning)
    digits = options.data == "digits"
    budget = {"steps": options.steps} if digits else {"seconds": options.seconds}
    found = records.earlier(RESULTS, "rows", keep=True)
    rows = {(r["setting"], r["seed"], r["row"]): r for r in found}
    for case in _digits(options.seeds) if digits else _cifar10(options):
        for row in _rows(case, fxfuse.Match(**budget)):
            print(row, flush=True)
            rows[row["setting"], row["seed"], row["row"]] = row
        records.write(RESULTS, {"torch": torch.__version__, "rows": list(rows.values())})
    text = pages.with_tables(PAGE.read_text(encoding="utf-8"), "mixed", table(list(rows.values())))
    PAGE.write_text(text, encoding="utf-8")


def _digits(seeds: Sequence[int]) -> Iterator[Case]:
    data = load_digits()
    inputs = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(data.target)
    for seed in seeds:
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        train, given, test = order[:800], order[800:1200], order[1200:]
        for setting in ("same", "specialists"):
            members = []
            for i, make in enumerate((Residual, _plain, _perceptron)):
                torch.manual_seed(10 * seed + i)
                known = torch.isin(labels[train], torch.tensor(_KNOWN[i]))
                seen = train[known] if setting == "specialists" else train
                members.append(_trained(make(), inputs[seen], labels[seen], 10 * seed + i))
            yield Case(setting, seed, members, inputs[given], inputs[test], labels[test])


def _trained(network: nn.Module, inputs: Tensor, labels: Tensor, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(network.parameters(), 3e-3)
    for _ in range(250):
        chosen = torch.randint(len(labels), (64,), generator=generator)
        optimiser.zero_grad()
        functional.cross_entropy(network(inputs[chosen]), labels[chosen]).backward()
        optimiser.step()
    return network.eval()


def _cifar10(options: argparse.Namespace) -> Iterator[Case]:
    data = load(options.data_root)
    for seed in options.seeds:
        members = [kept(network, f"{network}-same-{seed}") for network in _CIFAR10]
        given = data.calibration(options.calibration, seed)
        yield Case("CIFAR-10", seed, members, given, data.test.inputs, data.test.labels)


def _rows(case: Case, match: fxfuse.Match) -> Iterator[dict[str, Any]]:
    found = [outputs_of(n, case.inputs, batch=_BATCH, logits=True) for n in case.members]
    ensemble = mean_of(found)
    ends = accuracy(found[0], case.labels), accuracy(ensemble, case.labels)
    way = ends[1] - ends[0]

    def row(name: str, own: Tensor, cost: float, **more: Any) -> dict[str, Any]:
        reached = accuracy(own, case.labels)
        return {
            "setting": case.setting,
            "seed": case.seed,
            "row": name,
            "accuracy": reached,
            "base member": ends[0],
            "ensemble": ends[1],
            "share of the way": (reached - ends[0]) / way if way else None,
            "KL to the ensemble": kl(ensemble, own),
            "CPU seconds": round(cost, 1),
            "commit": records.described(),
        } | more

    yield row("base member", found[0], 0.0)
    cost = 0.0
    for name, steps in (("no step", []), ("matched", [match])):
        begin = time.process_time()
        result = fxfuse.fuse(
            case.members,
            case.given[:2],
            calibration=case.given,
            refine=[fxfuse.Refit(), *steps],
            verify=False,
        )
        cost = time.process_time() - begin
        assert result.history is not None
        moved = {"handed over": result.history.chosen, "moved": str(result.moved)}
        own = outputs_of(result.module, case.inputs, batch=_BATCH, logits=True)
        yield row(name, own, cost, **moved)
    asked = [outputs_of(n, case.given, batch=_BATCH, logits=True) for n in case.members]
    loop, taken = distil(
        case.members[0], case.given, mean_of(asked), seconds=cost, batch=64, logits=True
    )
    own = outputs_of(loop, case.inputs, batch=_BATCH, logits=True)
    yield row("base member, the same seconds of a plain loop", own, cost, steps=taken)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return a table of all settings: means over the seeds, with their ranges."""
    lines = ["| members | network | accuracy, % | KL to the ensemble | CPU s |"]
    lines.append("| --- | --- | ---: | ---: | ---: |")
    for setting in dict.fromkeys(r["setting"] for r in rows):
        own = [r for r in rows if r["setting"] == setting]
        for name in dict.fromkeys(r["row"] for r in own):
            some = [r for r in own if r["row"] == name]
            cells = [_mean([r[key] for r in some], n) for key, n in _COLUMNS]
            lines.append(f"| {setting} | {name} | {' | '.join(cells)} |")
        whole = _mean([r["ensemble"] for r in own if r["row"] == "base member"], 1)
        lines.append(f"| {setting} | ensemble of all three | {whole} | 0 | |")
    return "\n".join(lines) + "\n"


_COLUMNS = (("accuracy", 1), ("KL to the ensemble", 3), ("CPU seconds", 1))


def _mean(values: Sequence[float], digits: int) -> str:
    mean, least, most = sum(values) / len(values), min(values), max(values)
    return f"{mean:.{digits}f} ({least:.{digits}f} to {most:.{digits}f})"


if __name__ == "__main__":
    main()
