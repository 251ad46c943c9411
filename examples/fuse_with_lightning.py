"""The best checkpoints of a run of Lightning become one network, which a second run distils.

    pip install -e . lightning scikit-learn && python examples/fuse_with_lightning.py

A small network learns the digits of scikit-learn. ModelCheckpoint keeps the three best states on
validation images, and FuseCheckpoints fuses them, calibrated on unlabelled images. DistilMembers
then trains the fused network on the same images towards the mean of the members' logits.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from typing import Any

import torch
from lightning import pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fxfuse import Refit
from fxfuse.api.lightning import DistilMembers, FuseCheckpoints


class Digits(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU()
        ).append(nn.Linear(32, 10))

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def main(epochs: int) -> dict[str, float]:
    warnings.filterwarnings("ignore", module="lightning")
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, validation, unlabelled, test = order.split([800, 200, 300, 497])

    def loader(chosen: Tensor, *, shuffle: bool = False) -> DataLoader:
        return DataLoader(TensorDataset(images[chosen], labels[chosen]), 64, shuffle=shuffle)

    def accuracy(network: nn.Module) -> float:
        with torch.no_grad():
            return 100 * float((network(images[test]).argmax(1) == labels[test]).float().mean())

    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "accelerator": "cpu", "max_epochs": epochs}
    pl.seed_everything(0, verbose=False)
    with tempfile.TemporaryDirectory() as folder:
        keep = ModelCheckpoint(folder, monitor="val_loss", save_top_k=3, save_weights_only=True)
        fuse = FuseCheckpoints(
            images[:4], network="net", calibration=images[unlabelled], refine=[Refit()]
        )
        module = Digits()
        trainer = pl.Trainer(callbacks=[keep, fuse], **quiet)
        trainer.fit(module, loader(train, shuffle=True), loader(validation))
    assert fuse.result is not None
    print(fuse.result)
    found = {"last": accuracy(module.net.eval()), "fused": accuracy(fuse.result.module)}

    module.net = fuse.result.to_module()
    distil = DistilMembers(fuse.members, network="net")
    trainer = pl.Trainer(callbacks=[distil], enable_checkpointing=False, **quiet)
    trainer.fit(module, loader(unlabelled, shuffle=True))
    found["distilled"] = accuracy(module.net.eval())
    for name, percent in found.items():
        print(f"{name}: {percent:.1f} %")
    return found | {"members": len(fuse.paths)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=6)
    main(parser.parse_args().epochs)
