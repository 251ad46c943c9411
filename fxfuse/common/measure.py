"""What a network costs when it runs: parameters, operations, latency."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

#: Rounds in which networks are compared, and the fewest, where a call takes long.
_ROUNDS, _FEWEST = 15, 3


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


def race(
    networks: Sequence[Callable[..., Any]],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    seconds: float,
) -> list[float]:
    """Return the median latency of a call of each network in milliseconds.

    All have their turn in every round, so that what disturbs the machine disturbs all of them.

    Args:
        networks: Networks that take the same inputs.
        args: Positional inputs.
        kwargs: Keyword inputs.
        seconds: For all of them; three rounds are measured in any case.
    """

    def turn(network: Callable[..., Any], calls: int) -> float:
        started = clock()
        for _ in range(calls):
            network(*args, **kwargs)
        return (clock() - started) / calls

    with torch.no_grad():
        for network in networks:
            network(*args, **kwargs)
        share = seconds / (_ROUNDS * len(networks))
        calls = [max(1, int(share / max(turn(n, 1), 1e-9))) for n in networks]
        times: list[list[float]] = [[] for _ in networks]
        started = clock()
        for number in range(_ROUNDS):
            if number >= _FEWEST and clock() - started > seconds:
                break
            for own, network, count in zip(times, networks, calls, strict=True):
                own.append(turn(network, count))
    return [1e3 * statistics.median(own) for own in times]


def clock() -> float:
    """Return the time in seconds, once an accelerator has done what it was told.

    On one thread of the CPU only this thread's: other work on the machine does not count.
    """
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    elif torch.get_num_threads() == 1:
        return time.thread_time()
    return time.perf_counter()
