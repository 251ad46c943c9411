"""Memory that is used again: the system takes longer to hand out a page than to copy one."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
import torch

#: Elements that are worked on at once: few enough to stay in a processor's cache.
BLOCK = 1 << 17
#: From so many bytes on the C library asks the system for pages, which come as zeros.
_PAGES = 1 << 20
#: What torch's own tensors are aligned to, bytes.
_ALIGNED = 64


class Scratch:
    """Memory for one tensor at a time."""

    def __init__(self) -> None:
        self._memory: torch.Tensor | None = None

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Return a tensor without values, which is good until the next one is asked for."""
        count, kept = prod(shape), self._memory
        if kept is None or kept.numel() < count or (kept.dtype, kept.device) != (dtype, device):
            kept = torch.empty(max(count, BLOCK), dtype=dtype, device=device)
            self._memory = kept
        return kept[:count].view(list(shape))


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros; on a CPU, what of a large tensor nobody writes takes neither time nor memory."""
    size = prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < _PAGES:
        return torch.zeros(list(shape), dtype=dtype, device=device)
    # torch would write every zero.
    memory = np.zeros(size + _ALIGNED, dtype=np.uint8)
    start = -memory.ctypes.data % _ALIGNED
    return torch.from_numpy(memory[start : start + size]).view(dtype).view(list(shape))
