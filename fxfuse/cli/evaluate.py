"""What networks are worth, beside each other: accuracy, likeness to the ensemble, size, latency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxfuse.cli.report.content import Network
from fxfuse.cli.sources import Data
from fxfuse.errors import InputError
from fxfuse.graph.eager import eval_mode
from fxfuse.graph.example import first_line
from fxfuse.graph.torch_compat import pytree
from fxfuse.refine.batch import logits_of
from fxfuse.runtime.measure import flops, milliseconds, parameters

#: Inputs per call, and seconds of repetition for a latency.
_BATCH, RUN_TIME = 128, 0.3


class Ensemble(nn.Module):
    """The mean of the members' outputs, one member after the other.

    Args:
        members: Networks whose outputs have one shape.
    """

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the mean of the (first) outputs."""
        return torch.stack([logits_of(m(*args, **kwargs)) for m in self.members]).mean(0)


def evaluate(
    networks: Mapping[str, nn.Module],
    ensemble: nn.Module | None,
    data: Data | None,
    example: tuple[Any, ...],
    *,
    latency: bool = True,
) -> tuple[Network, ...]:
    """Measure networks on the same data.

    Args:
        networks: Networks by name.
        ensemble: What agreement and divergence are measured against; None: neither is.
        data: Examples, with labels for accuracies; None: only sizes and latency are measured.
        example: Inputs for FLOPs and latency.
        latency: Whether to measure latency.

    Returns:
        A row for each network.

    Raises:
        InputError: A network does not take the data.
    """
    wanted = None if data is None or ensemble is None else answers(ensemble, data)
    rows = []
    for name, network in networks.items():
        found = wanted if network is ensemble else None if data is None else answers(network, data)
        with eval_mode(network):
            operations = flops(network, example)
            took = milliseconds(network, example, RUN_TIME) if latency else None
        rows.append(
            Network(
                name,
                parameters(network),
                operations,
                accuracy(found, None if data is None else data.labels),
                agreement(found, wanted),
                divergence(found, wanted),
                took,
            )
        )
    return tuple(rows)


def beside_members(
    networks: Mapping[str, nn.Module],
    members: Sequence[nn.Module],
    data: Data | None,
    example: tuple[Any, ...],
    *,
    latency: bool = True,
) -> tuple[Network, ...]:
    """As `evaluate`, with rows of the members and of their ensemble before those of the networks.

    One member alone has no ensemble, and networks are measured against itself.

    Raises:
        InputError: A network does not take the data.
    """
    ensemble = Ensemble(members)
    rows: dict[str, nn.Module] = {f"member {i}": member for i, member in enumerate(members)}
    if len(members) > 1:
        rows[f"ensemble of {len(members)}"] = ensemble
    return evaluate({**rows, **networks}, ensemble, data, example, latency=latency)


def answers(network: nn.Module, data: Data) -> Tensor:
    """Return the outputs of a network in eval mode, float32 [n, *], on the CPU.

    Raises:
        InputError: It does not take the data.
    """
    found = []
    parameter = next(network.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    with torch.no_grad(), eval_mode(network):
        for start in range(0, len(data), _BATCH):
            batch = tuple(
                _like(x[start : start + _BATCH], parameter).to(device) for x in data.inputs
            )
            try:
                found.append(logits_of(network(*batch)).float().cpu())
            # The network may reject them with anything.
            except Exception as error:
                raise InputError(
                    "the network rejects the data",
                    where=", ".join(f"{list(x.shape)} {x.dtype}" for x in batch),
                    why=first_line(error),
                    how="pass examples of the shape and dtype that it was trained on",
                ) from error
    return torch.cat(found)


def _like(x: Tensor, parameter: Tensor | None) -> Tensor:
    return x.to(parameter.dtype) if parameter is not None and x.is_floating_point() else x


def accuracy(found: Tensor | None, labels: Tensor | None) -> float | None:
    """Share of class logits [n, k] whose largest is the label's [n], in percent; else None."""
    if found is None or labels is None or found.dim() != 2 or found.shape[1] < 2:
        return None
    return 100 * float((found.argmax(1) == labels).double().mean())


def agreement(found: Tensor | None, wanted: Tensor | None) -> float | None:
    """Share of class logits [n, k] that name the class which others name, in percent; else None."""
    if found is None or wanted is None or not _comparable(found, wanted):
        return None
    return 100 * float((found.argmax(1) == wanted.argmax(1)).double().mean())


def divergence(found: Tensor | None, wanted: Tensor | None) -> float | None:
    """KL(wanted ‖ found) of class logits [n, k], mean over inputs, in nats; else None."""
    if found is None or wanted is None or not _comparable(found, wanted):
        return None
    target, log = wanted.double().log_softmax(1), found.double().log_softmax(1)
    return max(float((target.exp() * (target - log)).sum(1).mean()), 0.0)


def _comparable(found: Tensor, wanted: Tensor) -> bool:
    return found.dim() == 2 and found.shape[1] > 1 and found.shape == wanted.shape


def repeated(example: tuple[Any, ...], batch: int) -> tuple[Any, ...]:
    """Return example inputs of another batch size: the first examples, over and over.

    Args:
        example: Inputs, each [n, ...].
        batch: The size.
    """

    def resize(x: Tensor) -> Tensor:
        return x[torch.arange(batch, device=x.device) % len(x)] if x.dim() else x

    found: tuple[Any, ...] = pytree.tree_map_only(Tensor, resize, example)
    return found
