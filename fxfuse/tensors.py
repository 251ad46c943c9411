"""The tensors of a module, by dotted name."""

from __future__ import annotations

import torch
from torch import nn


def fetch(module: nn.Module, target: str) -> torch.Tensor:
    """The tensor attribute of a dotted name."""
    prefix, _, leaf = target.rpartition(".")
    value = getattr(module.get_submodule(prefix), leaf)
    assert isinstance(value, torch.Tensor)
    return value


def attach(root: nn.Module, name: str, tensor: torch.Tensor, *, persistent: bool) -> None:
    """Registers a tensor under a dotted name: parameters as parameters, the rest as buffers."""
    *path, leaf = name.split(".")
    owner = root
    for part in path:
        if not hasattr(owner, part):
            owner.add_module(part, nn.Module())
        owner = getattr(owner, part)
    if isinstance(tensor, nn.Parameter):
        owner.register_parameter(leaf, tensor)
    else:
        owner.register_buffer(leaf, tensor, persistent=persistent)


def is_constant(tensor: torch.Tensor) -> bool:
    """Whether a state tensor is a constant of the network: integer and boolean tensors are."""
    return not (tensor.is_floating_point() or tensor.is_complex())
