"""Partial fusion on real data: two tasks on scikit-learn's digits, one trunk, two heads.

    python benchmarks/partial_fusion.py [--json benchmarks/results/partial_fusion.json]

One member tells even from odd digits, the other tells the ten digits apart. Rows: each member
alone; its head on the fused trunk right after fusion, and after a short joint fine-tuning; as
controls, both heads on one member's trunk and on a fresh trunk, fine-tuned for as many steps.
Validation images choose learning rates and the control's trunk; test images are looked at once per
row.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import fxfuse
from fxfuse import Heads
from fxfuse.refine import default_optimizer, finetune

TASKS = ("even or odd", "which digit")
CLASSES = (2, 10)
RATES = (1e-3, 3e-3, 1e-2)


class Net(nn.Module):
    """Two convolutions, a hidden layer, a head."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.conv2, self.norm2 = nn.Conv2d(16, 32, 3, stride=2), nn.BatchNorm2d(32)
        self.hidden = nn.Linear(288, 64)
        self.head = nn.Linear(64, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm1(self.conv1(x)).relu()
        x = self.norm2(self.conv2(x)).relu()
        return self.head(self.hidden(x.flatten(1)).relu())


@dataclass(frozen=True)
class Data:
    """Images [n, 1, 8, 8] and labels [n, 2], one column per task."""

    train: TensorDataset
    validation: TensorDataset
    test: TensorDataset

    @staticmethod
    def load(seed: int) -> Data:
        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
        digit = torch.tensor(digits.target)
        labels = torch.stack([digit % 2, digit], dim=1)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        parts = order.split([1000, 397, 400])
        return Data(*(TensorDataset(images[part], labels[part]) for part in parts))


Answer = Callable[[torch.Tensor], tuple[torch.Tensor, ...]]


def accuracies(answer: Answer, data: TensorDataset, tasks: tuple[int, ...]) -> list[float]:
    images, labels = data.tensors
    with torch.no_grad():
        pairs = zip(answer(images), tasks, strict=True)
        return [float((a.argmax(1) == labels[:, t]).float().mean()) for a, t in pairs]


def tune(
    module: nn.Module, data: Data, tasks: tuple[int, ...], steps: int, seed: int
) -> tuple[nn.Module, float]:
    """The module trained with the learning rate that validates best, and that rate."""

    def answers(network: nn.Module) -> Answer:
        return network if len(tasks) > 1 else lambda x: (network(x),)

    def loss(output: object, labels: torch.Tensor) -> torch.Tensor:
        outputs = output if len(tasks) > 1 else (output,)
        return sum(cross_entropy(o, labels[:, t]) for o, t in zip(outputs, tasks, strict=True))

    loader = DataLoader(data.train, batch_size=64, shuffle=True, drop_last=True)
    found = []
    for rate in RATES:
        network = copy.deepcopy(module)
        optimizer, scheduler = default_optimizer(network, steps, rate)
        finetune(
            network,
            loader,
            steps=steps,
            optimizer=optimizer,
            scheduler=scheduler,
            loss=loss,
            progress=False,
            seed=seed,
        )
        validated = sum(accuracies(answers(network), data.validation, tasks))
        found.append((validated, rate, network))
    _, rate, network = max(found, key=lambda row: row[0])
    return network, rate


def two_heads(members: list[nn.Module], images: torch.Tensor, method: str) -> nn.Module:
    return fxfuse.fuse(members, images, method=method, heads=Heads(["head"])).module


def on_trunk(members: list[nn.Module], trunk: int, images: torch.Tensor) -> nn.Module:
    """Both heads on the trunk of one member."""
    state = members[trunk].state_dict()
    moved = []
    for member in members:
        moved.append(copy.deepcopy(member))
        own = {n: t for n, t in member.state_dict().items() if n.startswith("head.")}
        moved[-1].load_state_dict({**state, **own})
    return two_heads(moved, images, "average")


def measure(seed: int, member_steps: int, tune_steps: int) -> dict[str, list[float]]:
    """Test accuracy of every row, one number per task."""
    data = Data.load(seed)
    images = data.train.tensors[0][:4]
    members = []
    for task, classes in enumerate(CLASSES):
        torch.manual_seed(100 * seed + task)
        members.append(tune(Net(classes), data, (task,), member_steps, seed)[0])
    both = (0, 1)

    def tested(network: nn.Module) -> list[float]:
        return accuracies(network, data.test, both)

    def tuned(network: nn.Module) -> nn.Module:
        return tune(network, data, both, tune_steps, seed)[0]

    rows = {"each member alone": tested(lambda x: tuple(m(x) for m in members))}
    for method in ("transplant", "weight_matching"):
        fused = two_heads(members, images, method)
        rows[f"fused ({method})"] = tested(fused)
        rows[f"fused ({method}) + fine-tuning"] = tested(tuned(fused))
    controls = [tuned(on_trunk(members, trunk, images)) for trunk in both]
    best = max(controls, key=lambda n: sum(accuracies(n, data.validation, both)))
    rows["one member's trunk, both heads + fine-tuning"] = tested(best)
    torch.manual_seed(100 * seed + 50)
    fresh = on_trunk([Net(classes) for classes in CLASSES], 0, images)
    rows["fresh trunk and heads + fine-tuning"] = tested(tuned(fresh))
    return rows


def summarise(runs: list[dict[str, list[float]]]) -> list[dict[str, object]]:
    table = []
    for name in runs[0]:
        for task, title in enumerate(TASKS):
            values = [100 * run[name][task] for run in runs]
            mean = sum(values) / len(values)
            row = {"network": name, "task": title}
            table.append(row | {"mean": mean, "min": min(values), "max": max(values)})
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--member-steps", type=int, default=200)
    parser.add_argument("--tune-steps", type=int, default=60)
    options = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    steps = (options.member_steps, options.tune_steps)
    rows = summarise([measure(seed, *steps) for seed in range(options.seeds)])
    for row in rows:
        spread = f"{row['mean']:5.1f} [{row['min']:5.1f}, {row['max']:5.1f}]"
        print(f"{row['network']:46}{row['task']:14}{spread}")
    if options.json:
        result = {
            "torch": torch.__version__,
            "seeds": options.seeds,
            "member_steps": steps[0],
            "tune_steps": steps[1],
            "seconds": round(time.perf_counter() - start, 1),
            "test_accuracy_percent": [
                {k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()}
                for row in rows
            ],
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
