"""A callback of Lightning that fuses the checkpoints of a run when it ends."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn

from fxfuse.api.fuse import fuse
from fxfuse.api.result import FusionResult
from fxfuse.api.saved import save
from fxfuse.errors import MemberError, OptionError
from fxfuse.members.members import Members


class FuseCheckpoints(Callback):  # type: ignore[misc]
    """Fuses the checkpoints that a run's `ModelCheckpoint` callbacks kept.

    Each `ModelCheckpoint` needs `save_top_k` of 2 or more, or there are several of them. The
    training module itself stays as it is. With several processes the first one fuses.

    Args:
        example: Example inputs, as in `fxfuse.fuse`.
        network: Name of the attribute of the `LightningModule` that is the network; "": the module
            itself.
        folder: Where the result is written; None: it is only kept as `result`.
        force: Whether an earlier result in the folder may be replaced.
        **options: Further arguments of `fxfuse.fuse`, such as `calibration`.

    Attributes:
        result: What `fxfuse.fuse` returned; None before the run has ended.
        paths: The checkpoints that were fused.
    """

    def __init__(
        self,
        example: Any,
        *,
        network: str = "",
        folder: str | Path | None = None,
        force: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        self.example, self.network, self.options = example, network, options
        self.folder, self.force = folder, force
        self.result: FusionResult | None = None
        self.paths: list[Path] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check before the run that there is a network, and that checkpoints are kept."""
        if not isinstance(self._network(pl_module), nn.Module):
            raise OptionError(
                f"{type(pl_module).__name__} has no network {self.network!r}",
                where="network",
                how="pass the name of the attribute that holds the network",
            )
        if not any(isinstance(each, ModelCheckpoint) for each in trainer.callbacks):
            raise OptionError(
                "nothing keeps checkpoints",
                where="callbacks",
                why="the members are those that ModelCheckpoint keeps",
                how='add ModelCheckpoint(monitor="val_loss", save_top_k=3, save_weights_only=True)',
            )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fuse the checkpoints.

        Raises:
            MemberError: Fewer than two were kept.
        """
        if not trainer.is_global_zero:
            return
        kept = [each for each in trainer.callbacks if isinstance(each, ModelCheckpoint)]
        found = {Path(path) for each in kept for path in each.best_k_models}
        self.paths = sorted(found)
        if len(self.paths) < 2:
            raise MemberError(
                f"{len(self.paths)} checkpoints were kept, and a fusion needs 2",
                where=", ".join(str(each.dirpath) for each in kept),
                how="pass ModelCheckpoint(save_top_k=2) or more, and its monitor",
            )
        template = copy.deepcopy(self._network(pl_module)).cpu().eval()
        members = Members.from_files(self.paths, template).load()
        self.result = fuse(members, self.example, **self.options)
        if self.folder is not None:
            save(self.result, self.folder, force=self.force)

    def _network(self, module: LightningModule) -> Any:
        return getattr(module, self.network, None) if self.network else module
