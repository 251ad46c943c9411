"""Recalibration: running statistics become those of calibration inputs, layer after layer.

Notation of shapes: n inputs, b batch, c channels, * any further dimensions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from fxfuse.activations.calibration import CalibrationBatches
from fxfuse.common.options import check_type
from fxfuse.errors import InputError, OptionError
from fxfuse.graph.arguments import argument_names
from fxfuse.graph.operator_facts import Normalisation, operators
from fxfuse.refine.batch import try_call
from fxfuse.refine.modes import device_of, evaluating

(_ATEN,) = operators(Normalisation, over="batch")
# How batch normalisation is called (by modules, by a fused graph, by hand) → its arguments.
_SPELLINGS: dict[Callable[..., Any], Sequence[str]] = {
    functional.batch_norm: list(inspect.signature(functional.batch_norm).parameters),
    _ATEN: argument_names(_ATEN),
    torch.batch_norm: argument_names(_ATEN),
}


def recalibrate(module: nn.Module, inputs: Any, *, batch: int = 1000) -> tuple[str, ...]:
    """Reset the running statistics of every batch normalisation to those of `inputs`, in place.

    One forward pass in which each layer normalises by the batch, so that later layers see what
    earlier ones give with their new statistics. The result is that of a pass in train mode with
    `momentum=None`, except that dropout is off, and that several batches are pooled exactly: the
    mean of all inputs, and their unbiased variance, not the mean of the batches' variances.

    Args:
        module: A network of any class, a fused `GraphModule` as well as the user's own; its modes
            and its counters of batches stay as they are.
        inputs: Unlabelled inputs `[n, *]`, or a tuple of positional inputs with the same n.
        batch: Inputs per forward pass, at most; all at once is exact, fewer take less memory.

    Returns:
        Names of the layers that were recalibrated; empty for a network without batch normalisation.

    Raises:
        InputError: The network rejects the inputs, or the input of a layer is not finite; no
            statistics were changed.
    """
    check_type("module", module, nn.Module, how="pass a network, such as result.module")
    if batch < 2:
        raise OptionError(
            f"batch must be at least 2, got {batch}",
            where="batch",
            why="statistics are computed over a batch of two or more",
            how="pass batch=2 or more",
        )
    device = device_of(module, None)
    collector = _Collector()
    given = CalibrationBatches.plain(inputs, batch)
    with evaluating([module], device), torch.no_grad(), collector:
        for part in given.moved(device).parts(-(-given.size // batch)):
            for args, kwargs in part.batches:
                try_call(module, args, "the network", kwargs)
    names = {id(t): name for name, t in module.named_buffers(remove_duplicate=False)}
    for moments in collector.found.values():
        moments.check(names)
    for moments in collector.found.values():
        moments.write()
    return tuple(moments.layer(names) for moments in collector.found.values())


@dataclass
class _Moments:
    """Mean and sum of squared deviations `[c]` of what a layer has seen so far, in float64."""

    running_mean: Tensor
    running_var: Tensor
    count: int
    mean: Tensor
    squares: Tensor

    def add(self, other: _Moments) -> None:
        """Pool with the moments of other values."""
        total = self.count + other.count
        apart = other.mean - self.mean
        self.squares += other.squares + apart**2 * (self.count * other.count / total)
        self.mean += apart * (other.count / total)
        self.count = total

    def layer(self, names: Mapping[int, str]) -> str:
        name = names.get(id(self.running_mean), "a batch normalisation without a name")
        return name.removesuffix(".running_mean")

    def check(self, names: Mapping[int, str]) -> None:
        if not bool((self.mean.isfinite() & self.squares.isfinite()).all()):
            raise InputError(
                "the input of a batch normalisation is not finite",
                where=self.layer(names),
                why="its statistics would be NaN or infinity",
                how="check the inputs, and the weights of the layers before it",
            )

    def write(self) -> None:
        self.running_mean.copy_(self.mean)
        self.running_var.copy_(self.squares / max(1, self.count - 1))


class _Collector(TorchFunctionMode):
    """Makes every batch normalisation use its batch, and notes the moments of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[int, _Moments] = {}

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = dict(zip(_SPELLINGS.get(function, ()), args, strict=False)) | dict(kwargs or {})
        if function not in _SPELLINGS or given["running_mean"] is None:
            return function(*args, **(kwargs or {}))
        self._note(given["input"], given["running_mean"], given["running_var"])
        # Without the running statistics, which stay as they are until the whole pass succeeded.
        given.update(training=True, running_mean=None, running_var=None)
        return function(**given)

    def _note(self, x: Tensor, running_mean: Tensor, running_var: Tensor) -> None:
        """Add the moments of `[b, c, *]` to those of the layer that owns the statistics."""
        variance, mean = torch.var_mean(x, [0, *range(2, x.dim())], correction=0)
        count = x.numel() // x.shape[1]
        fresh = _Moments(running_mean, running_var, count, mean.double(), variance.double() * count)
        known = self.found.setdefault(id(running_mean), fresh)
        if known is not fresh:
            known.add(fresh)
