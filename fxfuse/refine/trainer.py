"""The steps of a matching run: batches of a pool, the task's loss, AdamW.

Notation of shapes: b batch, p pool.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fxfuse.graph.run import Carried
from fxfuse.graph.torch_compat import pytree
from fxfuse.refine.modes import copies, restore, tensors_of, trainable
from fxfuse.refine.parallel import Together, is_sharded, reshard, together
from fxfuse.refine.pool import Pool
from fxfuse.refine.schedule import course
from fxfuse.refine.task import Task
from fxfuse.refine.watch import READ_EVERY, check_weights, last_finite

#: Bytes of activations that one step may keep for its backward pass.
_STEP_MEMORY = 1 << 30


class Trainer:
    """Trains a network to answer like the ensemble.

    Args:
        module: The network, trained in place.
        pool: What it is asked, and what it should answer.
        task: What that means.
        batch: Inputs per step.
        decay: Weight decay of parameters with two dimensions or more.
        seed: Seed of the order of the inputs.
    """

    def __init__(
        self, module: nn.Module, pool: Pool, task: Task, batch: int, decay: float, seed: int
    ) -> None:
        self.module, self.pool, self.task = module, pool, task
        self.batch, self.decay, self.seed = batch, decay, seed
        self.several: Together = together(module)
        (args, kwargs), _ = pool.batch(torch.arange(min(batch, pool.size)))
        self._carried = Carried(module, args, kwargs)
        reshard(module)
        #: CPU seconds of one step on one input, once it was measured (`cost`).
        self.seconds_per_input = 0.0
        #: Steps of the latest run, when it was looked at last.
        self.taken = 0

    def run(
        self,
        share: Callable[[int], float],
        rate: float,
        *,
        frozen: bool,
        look: Callable[[float, float], None] = lambda share, loss: None,
        checked: bool = True,
    ) -> Tensor:
        """Take steps until the share that is done is 1.

        Args:
            share: From the number of steps taken to the share of the run that is done.
            rate: Highest learning rate.
            frozen: Whether normalisation and dropout stay in eval mode.
            look: Told the share and the loss now and then.
            checked: Whether a loss that is not finite is an error.

        Returns:
            The loss of each step `[steps]`, on the CPU.

        Raises:
            RefineError: A loss or a weight is not finite.
        """
        optimizer = optimizer_of(self.module, rate, self.decay)
        orders = _orders(self.pool.size, self.batch, self.seed)
        losses: list[Tensor] = []
        read: list[float] = []
        self.module.train(not frozen)

        def report(done: float) -> None:
            fresh = torch.stack(losses).cpu()
            losses.clear()
            loss = last_finite(fresh, len(read)) if checked else float(fresh[-1])
            read.extend(fresh.tolist())
            self.taken = len(read)
            look(done, loss)
            self.module.train(not frozen)

        step = 0
        try:
            while (done := share(step)) < 1:
                for group in optimizer.param_groups:
                    group["lr"] = rate * course(done, step)
                chosen = self.several.part(next(orders))
                optimizer.zero_grad(set_to_none=True)
                error = self._loss(chosen)
                error.backward()
                optimizer.step()
                losses.append(self.several.mean(error.detach()))
                step += 1
                if step % READ_EVERY == 0:
                    report(done)
            if losses:
                report(1.0)
            if checked:
                check_weights(self.module)
        finally:
            self._carried.reset()
            self.module.eval()
        return torch.tensor(read)

    def _loss(self, chosen: Tensor) -> Tensor:
        leaves = (x for x in pytree.tree_leaves(self.pool.wanted) if isinstance(x, Tensor))
        device = next(leaves).device
        (args, kwargs), wanted = self.pool.batch(chosen.to(device, non_blocking=True))
        # The members' answers started from this state, too.
        self._carried.reset()
        return self.task.loss(self.task.read(self.module(*args, **kwargs)), wanted)

    def cost(self, inputs: int) -> tuple[float, float]:
        """CPU seconds and bytes of activations of one step, per input, measured on a few inputs.

        The network stays as it is.
        """
        kept = copies(self.module)
        seen: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            storage = x.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
            return x

        own = {t.untyped_storage().data_ptr() for t in tensors_of(self.module) if not is_sharded(t)}
        count = min(inputs, self.pool.size)
        chosen = torch.arange(count - count % self.several.count)
        begin = time.process_time()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            self._loss(chosen).backward()
        seconds = (time.process_time() - begin) / len(chosen)
        for parameter in self.module.parameters():
            parameter.grad = None
        self._carried.reset()
        restore(self.module, kept)
        size = sum(n for place, n in seen.items() if place not in own) / len(chosen)
        return seconds, size


def fitting_batch(bytes_per_input: float, most: int) -> int:
    """The largest batch, a power of two up to `most`, whose activations fit into the memory."""
    batch = 2
    while batch * 2 <= most and batch * 2 * bytes_per_input <= _STEP_MEMORY:
        batch *= 2
    return batch


def _orders(count: int, batch: int, seed: int) -> Iterator[Tensor]:
    """Yield indices `[b]` of a pool of `count`, in a new random order on each pass.

    A smaller remainder of a pass is dropped; a pool smaller than a batch makes one batch.
    """
    generator = torch.Generator().manual_seed(seed)
    size = min(batch, count)
    while True:
        order = torch.randperm(count, generator=generator)
        yield from order[: count - count % size].split(size)


def optimizer_of(module: nn.Module, rate: float, decay: float) -> torch.optim.Optimizer:
    """AdamW in which vectors do not decay."""
    trained = trainable(module)
    matrices = [parameter for parameter in trained if parameter.dim() > 1]
    others = [parameter for parameter in trained if parameter.dim() <= 1]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": decay},
        {"params": others, "weight_decay": 0.0},
    ]
    # One kernel for all parameters: small networks spend a third of a step in the loop over them.
    fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in trained)
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=rate, fused=fused)
