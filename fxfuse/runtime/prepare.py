"""What compiling, packaging and exporting begin with: the example, and the inference graph."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import fx, nn
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.fx.passes.infra.pass_base import PassBase

from fxfuse.errors import OptionError
from fxfuse.graph.tensors import tensors_in
from fxfuse.graph.torch_compat import (
    FakeTensorMode,
    flatten_inputs,
    inductor_modes,
    inductor_settings,
)
from fxfuse.refine.batch import try_call
from fxfuse.runtime.channels_last import ChannelsLast
from fxfuse.runtime.eval_form import EvalForm, RemoveDropout, inference_copy
from fxfuse.runtime.fold import FoldBatchNorm


def prepared(
    module: fx.GraphModule,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    channels_last: bool,
    folded: bool = True,
) -> tuple[fx.GraphModule, tuple[str, ...]]:
    """Return a copy of a network after the eval passes, and the names of those that changed it.

    Without `folded`, its operators stay as they are.
    """
    passes: list[PassBase] = [EvalForm()]
    if folded:
        passes += [RemoveDropout(), FoldBatchNorm()]
    if channels_last:
        passes.append(ChannelsLast())
    copy = inference_copy(module)
    if not any("val" in node.meta for node in copy.graph.nodes):
        # It was loaded or unpickled. Passes leave alone whatever has no shape then.
        with suppress(Exception):
            given = inspect.signature(copy.forward).bind(*args, **kwargs).arguments
            values = flatten_inputs(copy.graph, list(given.values()))
            FakeTensorProp(copy, FakeTensorMode(allow_non_fake_inputs=True)).propagate(*values)
    return copy, apply_passes(copy, passes)


def apply_passes(module: fx.GraphModule, passes: Sequence[PassBase]) -> tuple[str, ...]:
    """Run passes in order, each with its checks; return the names of those that changed it."""
    done = []
    for one in passes:
        result = one(module)
        if result is not None and result.modified:
            done.append(type(one).__name__)
    return tuple(done)


def answers_of(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[torch.Tensor]:
    """Return what the network itself answers in eval mode; which stays as it is."""
    return tensors_in(try_call(module, args, "the network", kwargs))


def inductor_options(mode: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a mode and options of inductor come to."""
    modes = inductor_modes()
    if mode is not None and mode not in modes:
        raise OptionError(f"unknown mode {mode!r}", how=f"use one of {', '.join(modes)}")
    names = inductor_settings()
    unknown = [name for name in options if name.replace("-", "_") not in names]
    if unknown:
        raise OptionError(
            f"unknown option {unknown[0]!r} of inductor",
            how="use one of torch._inductor.list_options()",
        )
    return {**modes.get(mode or "default", {}), **options}
