"""The endless stream of batches that a training loop reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from fxfuse.errors import InputError


class BatchStream:
    """Passes over `batches` again and again, with random numbers of its own.

    Loaders that shuffle draw from torch's global generator, and so does dropout. Here the loader
    gets a generator state of its own while it is being read, so that the n-th batch depends on the
    seed and n only, and runs that are compared read the same batches.

    Args:
        batches: Something that can be iterated more than once. A `set_epoch(int)` method of it, or
            of its `sampler` (`torch.utils.data.DistributedSampler` has one), is called before each
            pass.
        seed: Seed of the random numbers that `batches` draws from torch's CPU generator.
    """

    def __init__(self, batches: Iterable[Any], seed: int) -> None:
        self._batches = batches
        self._read = 0
        self._epoch = 0
        self._iterator: Iterator[Any] = iter(())
        # A seed derived from `seed`, since `seed` itself starts the generator of the network.
        derived = torch.randint(2**62, (), generator=torch.Generator().manual_seed(seed))
        self._random = torch.Generator().manual_seed(int(derived)).get_state()

    def next(self) -> Any:
        """Return the next batch, starting a new pass where the last one is used up."""
        outside = torch.get_rng_state()
        torch.set_rng_state(self._random)
        try:
            return self._pull()
        finally:
            self._random = torch.get_rng_state()
            torch.set_rng_state(outside)

    def _pull(self) -> Any:
        nothing = object()
        batch = next(self._iterator, nothing)
        if batch is nothing:
            self._iterator = self._new_pass()
            batch = next(self._iterator, nothing)
        if batch is nothing:
            raise self._ran_out()
        self._read += 1
        return batch

    def _new_pass(self) -> Iterator[Any]:
        sampler = getattr(self._batches, "sampler", None)
        set_epoch = getattr(self._batches, "set_epoch", getattr(sampler, "set_epoch", None))
        if set_epoch is not None:
            set_epoch(self._epoch)
        self._epoch += 1
        return iter(self._batches)

    def _ran_out(self) -> InputError:
        kind = type(self._batches).__name__
        if self._read == 0:
            return InputError(
                "there are no batches to train on",
                where=f"batches, a {kind}",
                why="iterating over it yielded nothing",
                how="pass at least one batch; an iterator that was read before is empty",
            )
        return InputError(
            f"the batches ran out after {self._read} steps",
            where=f"batches, a {kind}",
            why="it can be iterated only once, and the run needs another pass over it",
            how="pass a list, a DataLoader or fxfuse.cli.data.Batches, or use fewer steps",
        )
