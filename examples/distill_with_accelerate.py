"""A fused network distilled from its members in a loop of your own, with Accelerate.

    pip install -e . accelerate scikit-learn
    accelerate launch examples/distill_with_accelerate.py

Two small networks learn the digits of scikit-learn, each with many images of its own half of the
classes and few of the others. They are fused, and the loop brings the fused network to the mean of
their logits, without a label. Accelerate takes care of devices, processes and precision.
"""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fxfuse


def distil(student: nn.Module, members: list[nn.Module], images: Tensor, epochs: int) -> nn.Module:
    """Train a network to answer like the mean of its members' logits; it ends in eval mode."""
    accelerator = Accelerator()
    loader = DataLoader(TensorDataset(images), 32, shuffle=True)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    model, optimizer, loader = accelerator.prepare(student, optimizer, loader)
    # Nobody trains the members: they only have to be on the device.
    members = [member.to(accelerator.device).eval() for member in members]
    model.train()
    for _ in range(epochs):
        for (batch,) in loader:
            with torch.no_grad():
                wanted = torch.stack([member(batch) for member in members]).mean(0)
            difference = model(batch) - wanted
            loss = (difference - difference.mean(1, keepdim=True)).square().mean()
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
    return accelerator.unwrap_model(model).cpu().eval()


def trained(seed: int, images: Tensor, labels: Tensor) -> nn.Module:
    """A member that saw all images of one half of the classes, and a tenth of the others."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU())
    net.append(nn.Linear(32, 10))
    seen = (labels % 2 == seed) | (torch.rand(len(labels)) < 0.1)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(images[seen]), labels[seen]).backward()
        optimizer.step()
    return net.eval()


def main(epochs: int) -> dict[str, float]:
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).flatten(1) / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, unlabelled, test = order.split([900, 400, 497])

    def accuracy(answers: Tensor) -> float:
        return 100 * float((answers.argmax(1) == labels[test]).float().mean())

    members = [trained(seed, images[train], labels[train]) for seed in range(2)]
    result = fxfuse.fuse(
        members, images[:4], calibration=images[unlabelled], refine=[fxfuse.Refit()]
    )
    with torch.no_grad():
        found = {f"member {i}": accuracy(member(images[test])) for i, member in enumerate(members)}
        found["ensemble"] = accuracy(sum(member(images[test]) for member in members) / 2)
        found["fused, refitted"] = accuracy(result.module(images[test]))
    fused = distil(result.to_module(), members, images[unlabelled], epochs)
    with torch.no_grad():
        found["fused, distilled"] = accuracy(fused(images[test]))
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=20)
    for name, percent in main(parser.parse_args().epochs).items():
        print(f"{name}: {percent:.1f} %")
