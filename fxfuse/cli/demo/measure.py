"""What the demo measures of a network: accuracy, size, work, latency."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fxfuse.common import measure
from fxfuse.common.measure import milliseconds, parameters

# Seconds of repetition per latency; the median of that many runs is steady to a few percent.
_RUN_TIME = 0.5


def evaluate(module: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Return accuracy in [0, 1] and cross-entropy in nats on images `[n, 1, 28, 28]`."""
    with torch.no_grad():
        logits = module.eval()(images)
    accuracy = (logits.argmax(dim=1) == labels).float().mean()
    return float(accuracy), float(functional.cross_entropy(logits, labels))


def flops(module: nn.Module, batch: Tensor) -> int:
    """Return the floating-point operations per image; a multiply-add counts as two."""
    return measure.flops(module, (batch,)) // len(batch)


def latency(module: nn.Module, batch: Tensor, *, compiled: bool) -> float:
    """Return the median milliseconds for one batch, on as many threads as torch uses otherwise."""
    call = torch.compile(module, fullgraph=True) if compiled else module
    return milliseconds(call, (batch,), _RUN_TIME)


def costs(
    network: nn.Module, name: str, batch: Tensor, notes: list[str], *, compiled: bool
) -> dict[str, Any]:
    """Return parameters, FLOPs and latencies; what cannot be measured gets a note."""
    return {
        "params": parameters(network),
        "flops": flops(network, batch),
        "latency_ms": {
            "eager": latency(network, batch, compiled=False),
            "compiled": compiled_latency(network, name, batch, notes) if compiled else None,
        },
    }


def compiled_latency(
    network: nn.Module, name: str, batch: Tensor, notes: list[str]
) -> float | None:
    """Return the latency under `torch.compile`, or None and a note where it does not work.

    It needs a C++ compiler, and a machine without one should not lose the demo's other numbers.
    """
    try:
        return latency(network, batch, compiled=True)
    except RuntimeError as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        notes.append(f"torch.compile failed on the {name} network: {reason}")
        return None
