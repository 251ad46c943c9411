"""By how much a call raises the memory of this process, at its greatest; Linux only."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"


@dataclass
class Peak:
    """The greatest resident memory beyond that at the start, set when the region ends."""

    megabytes: float = 0.0


@contextmanager
def peak() -> Iterator[Peak]:
    """Measures a region of code.

    The peak is the kernel's own count of this address space: that of `getrusage` starts from the
    memory of the process that started this one. What was freed before goes back to the system
    first, as it would hide what the region allocates.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    _RESET.write_text(_RESET_PEAK, encoding="ascii")
    before = _megabytes("VmRSS")
    found = Peak()
    yield found
    found.megabytes = max(0.0, _megabytes("VmHWM") - before)


def _megabytes(name: str) -> float:
    for line in _STATUS.read_text(encoding="ascii").splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0]) / 1024
    raise RuntimeError(f"{_STATUS} has no line {name}")
