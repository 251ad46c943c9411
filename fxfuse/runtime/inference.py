"""A compiled network: what it is called through, and the report on how it was made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from fxfuse.errors import OptionError
from fxfuse.graph.example import Example
from fxfuse.graph.torch_compat import freezing, pytree


@dataclass(frozen=True)
class CompileReport:
    """How a network was compiled.

    Attributes:
        passes: Names of the passes that changed the graph.
        backend: What compiled it; `eager` where compiling failed.
        options: What the backend was told.
        dtype: What it computes in.
        error: Largest difference from the network's own outputs on the example inputs, relative to
            the largest output.
        failure: Why it was not compiled, or "".
        quantize: How weights of linear layers are quantised, or "".
        form: Which form it has: `frozen` (weights are constants), `channels last`, `folded` (after
            the passes), `plain` (what `torch.compile` makes of it as it is) or `eager`.
        measured: Milliseconds of a call in each form that was compared; empty where the size of
            the network told which is the fastest.
    """

    passes: tuple[str, ...]
    backend: str
    options: Mapping[str, Any]
    dtype: torch.dtype
    error: float
    failure: str = ""
    quantize: str = ""
    form: str = ""
    measured: Mapping[str, float] = field(default_factory=dict)


class Compiled(nn.Module):
    """A network for inference: called like the one that it was made of, always in eval mode.

    Attributes:
        report: How it was made.
        example: What it was compiled and compared with.
        graph_module: Its graph and weights, after the passes.
        dtype: What its inputs are cast to; None: they stay as they are.
    """

    report: CompileReport
    example: Example
    _call: Callable[..., Any]

    def __init__(self, graph_module: fx.GraphModule, call: Any, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.graph_module = graph_module
        # No submodule: those are looked up at every call, for as long as a small operator takes.
        self.__dict__["_call"] = call
        self.dtype = dtype
        super().train(False)

    def _apply(self, fn: Any, recurse: bool = True) -> Compiled:
        raise OptionError(
            "a compiled network cannot be moved or cast",
            why="it was compiled for its device and precision, and its weights may be constants",
            how="move or cast the module that it was made of, and compile that again",
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Take and return what the network does; outputs have the inputs' precision."""
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self.forward(*args, **kwargs)
        if self.dtype is None:
            return self._call(*args, **kwargs)
        own = _floating(args, kwargs)
        args, kwargs = _cast((args, kwargs), self.dtype)
        return _cast(self._call(*args, **kwargs), own)

    def uncompiled(self) -> Compiled:
        """Return the same network, computed operator by operator."""
        return Compiled(self.graph_module, self.graph_module, self.dtype)

    def train(self, mode: bool = True) -> Compiled:
        """Stay in eval mode: batch norms and dropout are gone."""
        if mode:
            raise OptionError(
                "a compiled network cannot be trained",
                why="its batch norms are folded, and its dropout is removed",
                how="train the module that it was made of, and compile that again",
            )
        return self


class Frozen:
    """Calls a compiled network; wherever it may be compiled anew, with the weights as constants.

    Dynamo looks at the setting when it captures, which an option of the backend comes too late for.
    """

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call
        self._seen: set[tuple[Any, ...]] = set()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Take and return what the network does."""
        plain = not kwargs and all(isinstance(x, torch.Tensor) for x in args)
        leaves = args if plain else pytree.tree_leaves((args, kwargs))
        shapes = tuple(x.shape if isinstance(x, torch.Tensor) else x for x in leaves)
        if shapes in self._seen:
            return self._call(*args, **kwargs)
        with freezing():
            result = self._call(*args, **kwargs)
        self._seen.add(shapes)
        return result


def _floating(args: Any, kwargs: Any) -> torch.dtype:
    """The precision of the inputs; the default one, where they are no floating-point numbers."""
    leaves = pytree.tree_leaves((args, kwargs))
    kinds = (x.dtype for x in leaves if isinstance(x, torch.Tensor) and x.is_floating_point())
    return next(kinds, torch.get_default_dtype())


def _cast(values: Any, dtype: torch.dtype) -> Any:
    return pytree.tree_map_only(
        torch.Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, values
    )
