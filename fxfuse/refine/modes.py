"""What surrounds a training run: the device, the random numbers, the networks to learn from."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from fxfuse.errors import MemberError, RefineError
from fxfuse.graph.eager import ALONE


def device_of(module: nn.Module, device: torch.device | str | None) -> torch.device:
    """Return where to train: `device`, or where the module is when it is None."""
    if device is not None:
        return torch.device(device)
    tensor = next(iter(module.parameters()), None)
    return torch.device("cpu") if tensor is None else tensor.device


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's global generators, and put them back afterwards."""
    cuda = [device] if device.type == "cuda" else []
    with ALONE, torch.random.fork_rng(devices=cuda):
        torch.default_generator.manual_seed(seed)
        if cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def trainable(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that require a gradient."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not parameters:
        raise RefineError(
            "there is nothing to train",
            where=type(module).__name__,
            why="no parameter of the module requires a gradient",
            how="call module.requires_grad_(True) first",
        )
    return parameters


def tensors_of(module: nn.Module) -> list[torch.Tensor]:
    """Return the parameters and buffers."""
    return [*module.parameters(), *module.buffers()]


def copies(module: nn.Module) -> list[torch.Tensor]:
    """Return a copy of each parameter and buffer as it is."""
    return [tensor.detach().clone() for tensor in tensors_of(module)]


def restore(module: nn.Module, kept: Sequence[torch.Tensor]) -> None:
    """Give a module the parameters and buffers back that `copies` returned."""
    with torch.no_grad():
        for tensor, old in zip(tensors_of(module), kept, strict=True):
            tensor.copy_(old)


def check_teachers(module: nn.Module, teachers: Sequence[nn.Module], name: str) -> None:
    """Check that there are networks to learn from, and others than the one that learns."""
    if not teachers:
        raise MemberError(
            f"there are no {name} to learn from",
            where=name,
            why="the module learns from their outputs",
            how="pass the members of the ensemble",
        )
    if any(teacher is module for teacher in teachers):
        raise MemberError(
            f"the module is one of its own {name}",
            where=name,
            why="training would change the outputs that it learns from",
            how="train a copy: copy.deepcopy(module)",
        )


@contextlib.contextmanager
def evaluating(modules: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Move `modules` to `device` and hold them in eval mode; their modes come back afterwards."""
    with ALONE:
        modes = [(part, part.training) for module in modules for part in module.modules()]
        for module in modules:
            module.to(device).eval()
        try:
            yield
        finally:
            for part, training in modes:
                part.training = training
