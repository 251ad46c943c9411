"""Networks that several processes train together, wrapped by torch's DDP or FSDP2.

Each process has its part of a batch, and torch averages the gradients. What is done here is what
is left: the loss of the whole batch, and which part of a batch is whose.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from fxfuse.errors import OptionError


@dataclass(frozen=True)
class Together:
    """The processes that train one network.

    Attributes:
        groups: Their process groups, one for each dimension of their mesh; none for one process.
        number: Of this process.
        count: How many there are.
    """

    groups: tuple[Any, ...] = ()
    number: int = 0
    count: int = 1

    def mean(self, loss: Tensor) -> Tensor:
        """The mean of a loss [] over all processes: that of the whole batch, of equal parts.

        One that is not finite is so everywhere, so that no process waits for one that has stopped.
        """
        if not self.groups:
            return loss
        total = loss.clone()
        for group in self.groups:
            dist.all_reduce(total, group=group)
        return total / self.count

    def part(self, batch: Tensor) -> Tensor:
        """This process's part of the indices of a batch [b]."""
        if len(batch) % self.count:
            raise OptionError(
                f"a batch of {len(batch)} has no {self.count} equal parts",
                where="batch",
                why="each process takes one part, and their gradients count alike",
                how=f"pass a batch that is a multiple of {self.count}, and at least as many inputs",
            )
        return batch[self.number :: self.count]


def together(module: nn.Module) -> Together:
    """The processes that train a module: several where it is wrapped by DDP or `fully_shard`."""
    if not dist.is_available() or not dist.is_initialized():
        return Together()
    # Imported here: they take a while, and most runs have one process.
    from torch.distributed.fsdp import FSDPModule
    from torch.nn.parallel import DistributedDataParallel

    if isinstance(module, DistributedDataParallel):
        group = module.process_group
        return Together((group,), dist.get_rank(group), dist.get_world_size(group))
    if isinstance(module, FSDPModule):
        mesh: Any = next(
            getattr(p, "device_mesh", None) for p in module.parameters() if is_sharded(p)
        )
        place = (mesh.mesh == dist.get_rank()).flatten().nonzero().item()
        return Together(tuple(mesh.get_all_groups()), int(place), mesh.size())
    return Together()


def reshard(module: nn.Module) -> None:
    """Make a module's parameters those that `fully_shard` keeps, whatever has run since."""
    if not dist.is_available() or not dist.is_initialized():
        return
    from torch.distributed.fsdp import FSDPModule

    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def is_sharded(tensor: Tensor) -> bool:
    """Whether each process has a part of a tensor only."""
    # Asked without torch.distributed.tensor, which takes long to import.
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """A tensor of which each process may have a part, as a plain one; all processes call this."""
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full
