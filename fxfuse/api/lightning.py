"""Callbacks of Lightning: fuse the checkpoints of a run, and distil an ensemble in a run."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn

from fxfuse.api.fuse import fuse
from fxfuse.api.result import FusionResult
from fxfuse.api.saved import save
from fxfuse.errors import MemberError, OptionError
from fxfuse.members.members import Members
from fxfuse.refine.batch import logits_of
from fxfuse.refine.modes import check_teachers
from fxfuse.refine.train import check_temperature, distillation_loss, mean_logits


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
        members: The networks in them, such as `DistilMembers` takes.
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
        self.members: Sequence[Any] = ()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check before the run that there is a network, and that checkpoints are kept."""
        _network(pl_module, self.network)
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
        template = copy.deepcopy(_network(pl_module, self.network)).cpu().eval()
        self.members = Members.from_files(self.paths, template).load().networks
        self.result = fuse(self.members, self.example, **self.options)
        if self.folder is not None:
            save(self.result, self.folder, force=self.force)


class DistilMembers(Callback):  # type: ignore[misc]
    """Adds the distance from the members' ensemble to the loss of each training step.

    With `weight` w, the loss is (1 − w) · own + w · distillation. Own is what `training_step`
    returns, and distillation is the loss of `fxfuse.distill` on the inputs that the step gives
    the network. The optimisation must be automatic.

    Args:
        members: Networks that take the network's inputs and return logits of its shape. They run
            in eval mode, and only their device changes.
        network: Name of the attribute of the `LightningModule` that is the network; "": the module
            itself.
        weight: w, above 0 and at most 1; at 1, labels have no influence.
        temperature: As in `fxfuse.distill`.
        class_dim: As in `fxfuse.distill`.
    """

    def __init__(
        self,
        members: Sequence[nn.Module],
        *,
        network: str = "",
        weight: float = 1.0,
        temperature: float = 4.0,
        class_dim: int = 1,
    ) -> None:
        super().__init__()
        if not 0 < weight <= 1:
            raise OptionError(
                f"weight must be in (0, 1], got {weight}",
                where="weight",
                why="it is the share of distillation in the loss",
                how="pass 1 to train without labels, or 0.5 for equal shares",
            )
        check_temperature(temperature)
        self.members, self.network, self.weight = list(members), network, weight
        self.temperature, self.class_dim = temperature, class_dim

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check before the run that there is something to learn from, and who learns it."""
        check_teachers(_network(pl_module, self.network), self.members, "members")
        if not pl_module.automatic_optimization:
            raise OptionError(
                f"{type(pl_module).__name__} optimises by itself",
                where="automatic_optimization",
                why="the loss that `training_step` returns is not the one that is minimised",
                how="call fxfuse.distill, or leave the optimisation to Lightning",
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Move the members to the run's device, and replace `training_step` during the run."""
        for member in self.members:
            member.to(pl_module.device)
        own, network = pl_module.training_step, _network(pl_module, self.network)

        @functools.wraps(own)
        def training_step(*args: Any, **kwargs: Any) -> Any:
            losses: list[Tensor] = []

            def compare(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
                wanted = mean_logits(self.members, lambda member: member(*args, **kwargs))
                losses.append(
                    distillation_loss(logits_of(output), wanted, self.temperature, self.class_dim)
                )

            hook = network.register_forward_hook(compare, with_kwargs=True)
            try:
                result = own(*args, **kwargs)
            finally:
                hook.remove()
            return self._mixed(result, losses)

        pl_module.training_step = training_step

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the module its own `training_step` back."""
        vars(pl_module).pop("training_step", None)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Give the module its own `training_step` back, as after a run."""
        self.on_train_end(trainer, pl_module)

    def _mixed(self, result: Any, losses: Sequence[Tensor]) -> Any:
        """What `training_step` returns, with the mixed loss."""
        if result is None:
            return None  # the step is skipped
        if not losses:
            raise OptionError(
                f"training_step never calls the network {self.network!r}",
                where="network",
                why="its inputs are what the members are asked",
                how="pass the name of the attribute that training_step calls as a module",
            )
        own = result["loss"] if isinstance(result, Mapping) else result
        mixed = torch.stack(list(losses)).mean().mul(self.weight)
        if self.weight < 1:
            mixed = mixed + (1 - self.weight) * own
        return {**result, "loss": mixed} if isinstance(result, Mapping) else mixed


def _network(module: LightningModule, name: str) -> nn.Module:
    """Return the network of a training module, by the name of its attribute."""
    network = getattr(module, name, None) if name else module
    if not isinstance(network, nn.Module):
        raise OptionError(
            f"{type(module).__name__} has no network {name!r}",
            where="network",
            how="pass the name of the attribute that holds the network",
        )
    return network
