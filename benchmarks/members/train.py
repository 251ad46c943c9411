"""Trains members on CIFAR-10 and keeps their weights in float16.

    python -m benchmarks.members.train resnet20 --setting halves --seeds 0 1 2
    python -m benchmarks.members.train resnet20 --setting same --seeds 0 1 2 3

`same` members see all training images and differ in their seed. `halves` makes two members a seed:
the seed puts the ten classes in order, the first member sees the first five, the second the rest.
Crops and flips, SGD with Nesterov's momentum, a one-cycle rate, arithmetic in bfloat16.
`benchmarks/results/members.json` states each member's accuracy, of the weights as they were kept.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from benchmarks import records
from benchmarks.members.cifar10 import CLASSES, Cifar10, Images, load
from benchmarks.members.networks import NETWORKS
from benchmarks.real.controls import accuracy, outputs_of

WEIGHTS = Path(__file__).parent / "weights"
RESULTS = Path(__file__).resolve().parents[1] / "results" / "members.json"
SETTINGS = ("same", "halves")
_BATCH = 128
_DECAY = 5e-4
# Convolutions take a higher rate than an MLP bears.
_RATES = {"resnet20": 0.2, "vgg11": 0.1, "convmixer": 0.05, "mlp": 0.05}
_EPOCHS = {"resnet20": 10, "vgg11": 10, "convmixer": 10, "mlp": 20}


def main() -> None:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("network", choices=sorted(NETWORKS))
    made.add_argument("--setting", choices=SETTINGS, default="same")
    made.add_argument("--seeds", type=int, nargs="+", default=[0])
    made.add_argument("--epochs", type=int, help="default: what the network's file says")
    made.add_argument("--data-root", type=Path, default=Path("../shared/data"))
    made.add_argument("--weights", type=Path, default=WEIGHTS, help="where weights are kept")
    options = made.parse_args()
    torch.set_num_threads(1)
    data = load(options.data_root)
    epochs = options.epochs or _EPOCHS[options.network]
    for seed in options.seeds:
        for name, part, first in _tasks(options.network, options.setting, seed, data):
            network, seconds = trained(options.network, part, epochs, first)
            options.weights.mkdir(parents=True, exist_ok=True)
            keep(network, options.weights / f"{name}.safetensors")
            network = kept(options.network, name, options.weights)
            row = {"name": name, "epochs": epochs, "CPU seconds": round(seconds)} | {
                f"accuracy on {what}": accuracy(
                    outputs_of(network, images.inputs, batch=500), images.labels
                )
                for what, images in (
                    ("held-out images", data.held_out),
                    ("its classes' held-out images", _of(data.held_out, part.labels.unique())),
                    ("test images", data.test),
                )
            }
            print(row, flush=True)
            rows = {r["name"]: r for r in [*records.earlier(RESULTS, "rows", keep=True), row]}
            records.write(RESULTS, {"rows": [rows[name] for name in sorted(rows)]})


def _tasks(
    network: str, setting: str, seed: int, data: Cifar10
) -> Iterator[tuple[str, Images, int]]:
    """The members of one seed: the name, the training images, the seed of the training."""
    if setting == "same":
        yield f"{network}-same-{seed}", data.train, seed
        return
    for i, classes in enumerate(halves(seed)):
        # Two members of one pair never start from the same weights.
        yield f"{network}-halves-{seed}-{i}", _of(data.train, classes), 100 + 2 * seed + i


def halves(seed: int) -> tuple[Tensor, ...]:
    """Return the classes that each of two members sees, five each."""
    order = torch.randperm(CLASSES, generator=torch.Generator().manual_seed(seed))
    return order[: CLASSES // 2], order[CLASSES // 2 :]


def _of(images: Images, classes: Tensor) -> Images:
    return images.where(torch.isin(images.labels, classes))


def trained(name: str, images: Images, epochs: int, seed: int) -> tuple[nn.Module, float]:
    """Train a network, and return it in evaluation mode with the CPU seconds that it took."""
    start = time.process_time()
    torch.manual_seed(seed)
    network = NETWORKS[name]().to(memory_format=torch.channels_last)
    optimiser = torch.optim.SGD(
        network.parameters(), _RATES[name], 0.9, weight_decay=_DECAY, nesterov=True
    )
    steps = epochs * (len(images.labels) // _BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, _RATES[name], total_steps=steps + 1)
    for inputs, labels in _batches(images, epochs, seed):
        with torch.autocast("cpu", torch.bfloat16):
            loss = functional.cross_entropy(network(inputs), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return network.eval(), time.process_time() - start


def _batches(images: Images, epochs: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled batches, each image moved by up to four pixels and mirrored by chance."""
    generator = torch.Generator().manual_seed(seed)
    padded = functional.pad(images.inputs, (4, 4, 4, 4)).to(memory_format=torch.channels_last)
    side = torch.arange(32)
    for _ in range(epochs):
        order = torch.randperm(len(images.labels), generator=generator)
        for chosen in order.split(_BATCH):
            if len(chosen) < _BATCH:
                continue
            top, left = torch.randint(0, 9, (2, _BATCH, 1), generator=generator)
            mirrored = torch.randint(0, 2, (_BATCH, 1), generator=generator).bool()
            columns = left + torch.where(mirrored, side.flip(0), side)
            rows = (top + side)[:, :, None]
            moved = padded.movedim(1, -1)[chosen[:, None, None], rows, columns[:, None, :]]
            yield moved.movedim(-1, 1), images.labels[chosen]


def keep(network: nn.Module, path: Path) -> None:
    """Write a network's weights in float16."""
    state = network.state_dict()
    half = {n: t.half() if t.is_floating_point() else t for n, t in state.items()}
    save_file({n: t.contiguous() for n, t in half.items()}, path)


def kept(network: str, name: str, folder: Path = WEIGHTS) -> nn.Module:
    """Return a trained member in float32 and in evaluation mode.

    Args:
        network: One of `NETWORKS`.
        name: The name of its file, such as `resnet20-halves-0-1`.
        folder: Where weights are kept.
    """
    made = NETWORKS[network]()
    state = load_file(folder / f"{name}.safetensors")
    made.load_state_dict({n: t.float() if t.is_floating_point() else t for n, t in state.items()})
    return made.eval()


if __name__ == "__main__":
    main()
