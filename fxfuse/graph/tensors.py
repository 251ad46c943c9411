"""Tensors of a module, by dotted name, and of nested structures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from fxfuse.graph.torch_compat import pytree


def fetch(module: nn.Module, target: str) -> torch.Tensor:
    """Return the tensor attribute of a dotted name."""
    value = attrgetter(target)(module)
    assert isinstance(value, torch.Tensor)
    return value


def attach(root: nn.Module, name: str, tensor: torch.Tensor, *, persistent: bool) -> None:
    """Register a tensor under a dotted name: parameters as parameters, the rest as buffers."""
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
    """Tell whether a state tensor is a constant of the network: integer and boolean tensors are."""
    return not (tensor.is_floating_point() or tensor.is_complex())


def floating_dtype(tensors: Iterable[torch.Tensor]) -> torch.dtype:
    """Return the dtype of the first floating-point tensor, or of the first complex one.

    float32 when there is neither.
    """
    dtypes = [tensor.dtype for tensor in tensors]
    real = [dtype for dtype in dtypes if dtype.is_floating_point]
    imaginary = [dtype for dtype in dtypes if dtype.is_complex]
    return [*real, *imaginary, torch.float32][0]


def named_tensors(module: nn.Module, *, recurse: bool = True) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the parameters and buffers of a module by name, tied ones under each of their names."""
    yield from module.named_parameters(recurse=recurse, remove_duplicate=False)
    yield from module.named_buffers(recurse=recurse, remove_duplicate=False)


def tensors_in(value: Any) -> list[torch.Tensor]:
    """Return all tensors in a nested structure, in its order."""
    return [x for x in pytree.tree_leaves(value) if isinstance(x, torch.Tensor)]
