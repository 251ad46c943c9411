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
) -> float:
    """Return the median latency of a call, on as many threads as torch uses otherwise.

    The call is repeated for `run_time` seconds.
    """
    # Here, since it takes a second to import.
    from torch.utils.benchmark import Timer

    with torch.no_grad():
        network(*args, **kwargs)
        timer = Timer(
            "network(*args, **kwargs)",
            globals={"network": network, "args": args, "kwargs": kwargs},
            num_threads=torch.get_num_threads(),
        )
        return float(timer.blocked_autorange(min_run_time=run_time).median * 1e3)


def least_cpu_milliseconds(
    network: Callable[..., Any], args: tuple[Any, ...], run_time: float, kwargs: Mapping[str, Any]
) -> float:
    """Return the least CPU time of a call, which is repeated for `run_time` seconds.

    On one thread it is the latency where no other process interrupts a call.
    """
    with torch.no_grad():
        network(*args, **kwargs)
        begin, found = time.process_time(), list[float]()
        while not found or time.process_time() - begin < run_time:
            start = time.process_time()
            network(*args, **kwargs)
            found.append(time.process_time() - start)
    return 1e3 * min(found)
