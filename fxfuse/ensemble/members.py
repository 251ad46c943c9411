"""The members of a stack, taken out again."""

from __future__ import annotations

import torch
from torch import nn

from fxfuse.ensemble.weights import Inventory, Place, name_in_stack
from fxfuse.errors import RewriteError
from fxfuse.graph.torch_compat import original_module

#: Under this key of `GraphModule.meta` a stack keeps its inventory.
INVENTORY = "fxfuse.stack"


def unstack(module: nn.Module) -> list[dict[str, torch.Tensor]]:
    """Return the members of a stack as they are now, trained or not.

    Args:
        module: What `fxfuse.stack` returned, or a copy of it: pickled, moved, compiled.

    Returns:
        For each member its `state_dict()`: names, shapes, order and ties are those of the network
        that was stacked. As in `nn.Module.state_dict`, tensors share memory with the module.

    Raises:
        RewriteError: The module is not a stack.
    """
    inventory = getattr(module, "meta", {}).get(INVENTORY)
    if not isinstance(inventory, Inventory):
        raise RewriteError(
            f"a {type(module).__name__} is not a stack",
            why="it does not record where the members' tensors are",
            how="pass what fxfuse.stack returned",
        )
    # Of a compiled module, the module that was compiled.
    own = original_module(module).state_dict()
    return [_member(own, inventory, number) for number in range(len(inventory.entries))]


def _member(
    own: dict[str, torch.Tensor], inventory: Inventory, number: int
) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = {}
    for entry in inventory.entries[number]:
        if entry.key in state:
            state[entry.name] = state[entry.key]
            continue
        tensor = own[name_in_stack(entry.place, entry.word, number)]
        if entry.place is Place.STACKED:
            tensor = tensor.reshape(len(inventory.entries), *entry.shape)[number]
        state[entry.name] = tensor
    return state
