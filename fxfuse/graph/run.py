"""Running a network: whatever its forward pass writes, it is afterwards what it was.

A forward pass may write buffers (moving averages, queues, counters, caches), weights, attributes
and inputs, and it may draw random numbers. So every run of a user's module goes through `untouched`
or `answers`: it changes nothing, and two runs that are compared start from the same state.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.func import functional_call

from fxfuse.graph.eager import ALONE
from fxfuse.graph.functional import written_names
from fxfuse.graph.tensors import named_tensors
from fxfuse.graph.torch_compat import FakeTensor, own_tensors, pytree

_CONTAINERS = (dict, OrderedDict, list, deque, set)


@contextmanager
def untouched(*modules: nn.Module) -> Iterator[None]:
    """Hold modules in eval mode; afterwards they and torch's random state are what they were.

    That is: modes, values of tensors, and what attributes hold, lists and dictionaries included.
    Of parameters that are spread over processes (`fully_shard`) only modes come back. No other
    thread is at a module of the user's meanwhile.
    """
    with ALONE:
        kept = [_Kept(module) for module in modules]
        try:
            with same_random_state():
                for module in modules:
                    for part in module.modules():
                        # Set directly: modules that torch.export made reject eval().
                        part.training = False
                yield
        finally:
            for each in kept:
                each.restore()


@contextmanager
def same_random_state() -> Iterator[None]:
    """Put torch's random state back afterwards, on all devices."""
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)


def answers(
    module: nn.Module,
    state: Mapping[str, torch.Tensor],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    """Return what a module answers in eval mode, with other tensors where `state` names them.

    The module, these tensors, the inputs and torch's random state stay as they are.
    """
    args, kwargs = pytree.tree_map_only(torch.Tensor, _copy, (args, dict(kwargs)))
    with torch.no_grad(), untouched(module):
        if not state:
            return _apart(module(*args, **kwargs))
        written = _written(module)
        own = {n: _copy(t) if written is None or n in written else t for n, t in state.items()}
        return _apart(functional_call(module, own, args, dict(kwargs)))


class Carried:
    """Buffers that a run in eval mode changes: what a network carries from one run to the next."""

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        written = _written(module)
        before = {
            n: (b, _copy(b))
            for n, b in module.named_buffers()
            if (written is None or n in written) and not hasattr(b, "full_tensor")
        }
        self._places: list[tuple[nn.Module, str]] = []
        self._before: list[tuple[torch.Tensor, torch.Tensor]] = []
        if not before:
            return
        args, kwargs = pytree.tree_map_only(torch.Tensor, _copy, (args, dict(kwargs)))
        with torch.no_grad(), untouched(module):
            module(*args, **kwargs)
            after = dict(module.named_buffers())
            changed = [n for n, (_, old) in before.items() if not torch.equal(after[n], old)]
        owners = (name.rpartition(".") for name in changed)
        self._places = [(module.get_submodule(path), leaf) for path, _, leaf in owners]
        self._before = [before[name] for name in changed]

    def reset(self) -> None:
        """Put them back to what they were."""
        for (owner, leaf), (buffer, old) in zip(self._places, self._before, strict=True):
            with torch.no_grad():
                buffer.detach_().copy_(old)
            setattr(owner, leaf, buffer)


def _apart(answer: Any) -> Any:
    """Copies, since an answer may be a tensor of the network, which gets its old values back."""
    return pytree.tree_map_only(torch.Tensor, torch.clone, answer)


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone()


def _written(module: nn.Module) -> Collection[str] | None:
    """Names of tensors that a run may write; None where that can be any."""
    if not isinstance(module, fx.GraphModule):
        return None
    graph: fx.Graph = module.graph
    whole = all(node.op not in ("call_module", "call_method") for node in graph.nodes)
    return written_names(graph) if whole else None


class _Kept:
    """What a module was."""

    def __init__(self, module: nn.Module) -> None:
        self._modes = [(part, part.training) for part in module.modules()]
        self._held: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._contents: dict[int, tuple[Any, Any]] = {}
        #: Each tensor, its memory under another object, and a copy of its values.
        self._tensors: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        tensors, written = dict(named_tensors(module)), _written(module)
        if any(hasattr(tensor, "full_tensor") for tensor in tensors.values()):
            return
        # torch.export puts its own there, and puts them back unless it is interrupted.
        self._held = [(held, dict(held)) for p in module.modules() for held in own_tensors(p)]
        if written is None:
            self._keep(module)
        else:
            for name in tensors.keys() & written:
                self._keep(tensors[name])

    def _keep(self, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            # Those that consist of others (quantised weights) cannot be compared.
            left = value.is_meta or isinstance(value, FakeTensor)
            left = left or hasattr(value, "__tensor_flatten__")
            if id(value) not in self._tensors and not left:
                own = value.detach()
                self._tensors[id(value)] = (value, own, own.clone())
            return
        if isinstance(value, nn.Module):
            value = vars(value)
        if type(value) not in _CONTAINERS or id(value) in self._contents:
            return
        self._contents[id(value)] = (value, value.copy())
        for each in list(value.values() if isinstance(value, dict) else value):
            self._keep(each)

    def restore(self) -> None:
        for container, content in self._contents.values():
            if not _is_same(container, content):
                container.clear()
                (container.extend if isinstance(container, list | deque) else container.update)(
                    content
                )
        for held, were in self._held:
            if any(held.get(name) is not tensor for name, tensor in were.items()):
                held.update(were)
        for part, training in self._modes:
            part.training = training
        for tensor, own, values in self._tensors.values():
            if tensor.data_ptr() != own.data_ptr() or tensor.shape != own.shape:
                tensor.data = own
            if not torch.equal(own, values):
                with torch.no_grad():
                    own.copy_(values)


def _is_same(a: Any, b: Any) -> bool:
    """Whether two containers hold the very same objects, in the same order."""
    if len(a) != len(b):
        return False
    pairs = zip(a.items(), b.items(), strict=True) if isinstance(a, dict) else None
    if pairs is not None:
        return all(x[0] == y[0] and x[1] is y[1] for x, y in pairs)
    return all(x is y for x, y in zip(a, b, strict=True))
