"""What a network costs when it runs: parameters, operations, latency."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


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

    The call is repeated for `run_time` seconds. With `cpu_time` the process's CPU time counts: what
    one thread takes where nothing interrupts it. With `fastest` the fastest call counts.
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
        found = timer.blocked_autorange(min_run_time=run_time)
    return float(min(found.times) if fastest else found.median) * 1e3
