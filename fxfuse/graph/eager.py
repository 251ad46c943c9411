"""Eager modules: a trace of one that torch.export rejects.

A trace holds for the example that it was made with: another input may take another branch or give
other sizes. It serves the analysis; what runs is the module (docs/adr/0010-eager-fallback.md).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import fx, nn
from torch.fx.traceback import preserve_node_meta
from torch.overrides import TorchFunctionMode

from fxfuse.errors import CaptureError
from fxfuse.graph.torch_compat import make_fx, pytree

P = ParamSpec("P")
R = TypeVar("R")

#: Held while a module of the user's runs, is read, copied or exported, and while torch's own
#: generators are seeded. Tracing puts other tensors into a module and other methods into its class;
#: modes and random numbers belong to the whole process. A thread that holds it gets it again.
ALONE = threading.RLock()

#: What may be in inputs and outputs: nothing in it can hide a tensor.
_PLAIN = (
    torch.Tensor,
    int,
    float,
    complex,
    bool,
    str,
    bytes,
    type(None),
    torch.dtype,
    torch.device,
    torch.Size,
    slice,
)


# A number or an array that Python takes out of a tensor is not followed any further. This operator
# marks the place in the trace; it has no rule, so the neurons that went out there freeze.
@torch.library.custom_op("fxfuse::leaves_the_graph", mutates_args=())
def _mark(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


@_mark.register_fake
def _mark_fake(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def alone(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function run while no other thread is at a module of the user's (`ALONE`)."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with ALONE:
            return function(*args, **kwargs)

    return run


def trace(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    state: Mapping[str, torch.Tensor],
) -> fx.GraphModule:
    """Trace one run of a module, composite operators undecomposed.

    Args:
        model: The module, in eval mode.
        args: Positional inputs: tensors, in any nesting of lists, tuples and dictionaries.
        kwargs: Keyword inputs, likewise.
        state: The module's own tensors (not copies) by `state_dict()` name.

    Returns:
        A graph module. `get_attr` targets are names of `state`, or constants that it holds; nodes
        have `meta["val"]` and `stack_trace`. Its graph takes and returns the tensors among inputs
        and outputs only.
    """
    leaves, spec = pytree.tree_flatten((args, dict(kwargs)))
    _check_plain(leaves, "input", model)
    # Copies, since the module may write into its inputs.
    tensors = [x.detach().clone() for x in leaves if isinstance(x, torch.Tensor)]

    def run(*given: torch.Tensor) -> list[torch.Tensor]:
        rest = iter(given)
        filled = [next(rest) if isinstance(x, torch.Tensor) else x for x in leaves]
        own_args, own_kwargs = pytree.tree_unflatten(filled, spec)
        with _Leaving():
            found = pytree.tree_leaves(model(*own_args, **own_kwargs))
        _check_plain(found, "output", model)
        return [x for x in found if isinstance(x, torch.Tensor)]

    try:
        with torch.no_grad(), preserve_node_meta():
            traced = make_fx(
                run,
                tracing_mode="real",
                pre_dispatch=True,
                record_stack_traces=True,
                # A branch is taken as the example takes it: that is what this trace is for.
                _error_on_data_dependent_ops=False,
            )(*tensors)
    except CaptureError:
        raise
    except Exception as error:
        text = str(error).strip()
        raise CaptureError(
            f"{type(model).__name__} cannot be traced",
            why=f"{type(error).__name__}: {text.splitlines()[0] if text else 'no message'}",
            how="make the forward pass exportable (https://docs.pytorch.org/docs/stable/export.html)",
        ) from error
    _name_tensors(traced, state, model)
    return traced


class _Leaving(TorchFunctionMode):
    """Sees the ways out of a tensor that the dispatcher, and so the trace, does not see."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__):
            _mark(args[0])
        # Equal, not identical: every look at a descriptor makes another one.
        if func == torch.Tensor.data.__get__:  # type: ignore[attr-defined]
            return args[0].detach()
        return func(*args, **(kwargs or {}))


def _check_plain(leaves: Sequence[Any], what: str, model: nn.Module) -> None:
    for leaf in leaves:
        if not isinstance(leaf, _PLAIN):
            raise CaptureError(
                f"{type(model).__name__} has an {what} of type {type(leaf).__name__}",
                why="tensors inside such an object cannot be traced",
                how="use tensors in tuples, lists and dictionaries, or register the type with "
                "torch.utils._pytree.register_pytree_node",
            )


def _name_tensors(
    traced: fx.GraphModule, state: Mapping[str, torch.Tensor], model: nn.Module
) -> None:
    """Give every tensor that the graph reads its `state_dict()` name, or a constant's name."""
    own = {id(tensor): name for name, tensor in reversed(list(state.items()))}
    memory = {_memory(tensor): name for name, tensor in state.items() if tensor.numel()}
    constants: dict[int, str] = {}
    for node in traced.graph.nodes:
        if node.op != "get_attr":
            continue
        tensor = getattr(traced, node.target)
        if not isinstance(tensor, torch.Tensor):
            raise CaptureError(
                f"{type(model).__name__} cannot be traced",
                where=node.name,
                why="it calls a higher-order operator, whose body is a separate graph",
                how="write this part with plain operators",
            )
        name = own.get(id(tensor)) or memory.get(_memory(tensor))
        if name is None:
            if id(tensor) not in constants:
                name = f"_traced_constant{len(constants)}"
                while name in state or hasattr(traced, name):
                    name += "_"
                traced.register_buffer(name, tensor)
                constants[id(tensor)] = name
            name = constants[id(tensor)]
        node.target = name


def _memory(tensor: torch.Tensor) -> tuple[Any, ...]:
    # Another object on the same memory is the same tensor: `weight.data`, say.
    return (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
