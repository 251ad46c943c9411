"""What a network costs when it runs: parameters, operations, latency."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

#: Parts of the time of which the fastest counts.
_BLOCKS = 3


def parameters(network: nn.Module) -> int:
    """Return the number of parameter elements, buffers not counted."""
    return sum(parameter.numel() for parameter in network.parameters())


def flops(network: Callable[..., Any], example: tuple[Any, ...]) -> int:
    """Return the floating-point operations for the example inputs; a multiply-add counts as two."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(*example)
    return int(counter.get_total_flops())


def milliseconds(
    network: Callable[..., Any],
    args: tuple[Any, ...],
    run_time: float,
    kwargs: Mapping[str, Any] = MappingProxyType({}),
    *,
    cpu_time: bool = False,
    fastest: bool = False,
) -> float:
    """Return the median latency of a call, on as many threads as torch uses otherwise.

    The call is repeated for `run_time` seconds, of which with `fastest` the fastest part counts.
    With `cpu_time` it is the process's CPU time: what one thread takes where nothing interrupts it.
    """
    # Here, since it takes a second to import.
    from torch.utils.benchmark import Timer

    clock: dict[str, Any] = {"timer": time.process_time} if cpu_time else {}
    with torch.no_grad():
        network(*args, **kwargs)
        timer = Timer(
            "network(*args, **kwargs)",
            globals={"network": network, "args": args, "kwargs": kwargs},
            num_threads=torch.get_num_threads(),
            **clock,
        )
        if not fastest:
            return float(timer.blocked_autorange(min_run_time=run_time).median * 1e3)
        calls = max(1, round(run_time / _BLOCKS / timer.timeit(1).median))
        return float(min(timer.timeit(calls).median for _ in range(_BLOCKS)) * 1e3)
