"""`fxfuse.compile`: eval passes first, then torch.compile, and a check of what came out."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils.flop_counter import FlopCounterMode

from fxfuse.common.measure import milliseconds
from fxfuse.errors import CompileError, OptionError
from fxfuse.graph.example import first_line
from fxfuse.graph.run import untouched
from fxfuse.graph.tensors import tensors_in
from fxfuse.refine.fused import Fused
from fxfuse.runtime.inference import Compiled, CompileReport, Frozen
from fxfuse.runtime.inputs import resolve_inputs
from fxfuse.runtime.layouts import LAYOUTS, Layout, by_rule, device_of
from fxfuse.runtime.prepare import answers_of, inductor_options, prepared
from fxfuse.verify.check import relative_error

_INDUCTOR = "inductor"
#: Seconds for which each layout is measured.
_RUN_TIME = 0.3
#: What a network may be computed in.
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def compile(
    network: Fused | fx.GraphModule,
    example: Any = None,
    *,
    backend: str = "inductor",
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    dynamic: bool | None = None,
    dtype: torch.dtype | None = None,
    channels_last: bool | None = None,
    freeze: bool | None = None,
    tune: bool = False,
    strict: bool = False,
) -> Compiled:
    """Compile a network for inference, on the device that it is on.

    It works on a copy: writes the mode into the graph, removes dropout, folds batch norms, puts the
    channels of images innermost, and calls `torch.compile(fullgraph=True)`. The result is run on
    the example inputs and compared with the network itself.

    Args:
        network: What `fuse` or `prune` returned, or a graph module (of `stack`, say). It is left as
            it is.
        example: Example inputs, as in `fxfuse.fuse`. None: those that it was fused with.
        backend: A backend of `torch.compile`.
        mode: A mode of `torch.compile`: `reduce-overhead`, `max-autotune` and the like.
        options: Options for the backend, added to those of the mode.
        dynamic: Passed to `torch.compile`.
        dtype: Computes in this precision, bfloat16 for instance: inputs are cast to it, and outputs
            back. The report's error says what that costs.
        channels_last: Whether two-dimensional convolutions run with channels innermost. None: where
            weights are not frozen, since inductor chooses the layout of those itself.
        freeze: Whether inductor keeps the weights as constants, in the layout that suits it. None:
            on the CPU, for networks that take long enough for it to pay.
        tune: Whether to compile in every layout and keep the one that runs the example fastest.
        strict: Whether a backend that fails is an error. Otherwise a warning says why, and the
            network runs uncompiled.

    Returns:
        A module for inference with a `report`.

    Raises:
        CompileError: With `strict`: the backend failed.
        CaptureError: `torch.export` rejected the members, so there is no graph.
    """
    module, given = resolve_inputs(network, example)
    args, kwargs = given.args, dict(given.kwargs)
    told = _options(backend, mode, options)
    if dtype is not None and dtype not in DTYPES:
        raise OptionError(
            f"unsupported dtype {dtype}",
            how=f"use one of {', '.join(map(str, DTYPES))}",
        )
    if tune and (freeze is not None or channels_last is not None):
        raise OptionError(
            "tune=True contradicts freeze and channels_last",
            why="tuning chooses them",
            how="leave out either these options or tune",
        )
    with FlopCounterMode(display=False) as counter:
        expected = answers_of(module, args, kwargs)
    operations = counter.get_total_flops()
    layouts = [by_rule(device_of(module), operations, freeze, channels_last)]
    if tune:
        layouts = [layout for layout in LAYOUTS if backend == _INDUCTOR or not layout.freeze]
    elif backend != _INDUCTOR:
        layouts = [layouts[0]._replace(freeze=False, channels_last=channels_last is not False)]
    settings = _Asked(module, backend, told, dynamic, dtype, strict)
    found = [_compiled(settings, layout, args, kwargs, expected) for layout in layouts]
    if tune:
        found.sort(key=lambda compiled: _latency(compiled, args, kwargs))
    return found[0]


def _latency(compiled: Compiled, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    with untouched(compiled.graph_module):
        return milliseconds(compiled, args, _RUN_TIME, kwargs)


@dataclass(frozen=True)
class _Asked:
    """What stays the same, whatever the layout."""

    module: fx.GraphModule
    backend: str
    options: Mapping[str, Any]
    dynamic: bool | None
    dtype: torch.dtype | None
    strict: bool


def _compiled(
    asked: _Asked,
    layout: Layout,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    expected: list[torch.Tensor],
) -> Compiled:
    """Return a network in one layout, compiled and compared."""
    copy, changed = prepared(asked.module, args, kwargs, channels_last=layout.channels_last)
    if asked.dtype is not None:
        copy.to(asked.dtype)
    run = torch.compile(
        copy,
        fullgraph=True,
        dynamic=asked.dynamic,
        backend=asked.backend,
        options=dict(asked.options) or None,
    )
    compiled = Compiled(copy, Frozen(run) if layout.freeze else run, asked.dtype)
    backend, failure = asked.backend, ""
    told = {**asked.options, **({"freezing": True} if layout.freeze else {})}
    try:
        found = _tried(compiled, copy, args, kwargs)
    # Backends raise whatever they like.
    except Exception as error:
        failure = first_line(getattr(error, "inner_exception", error))
        if asked.strict:
            raise CompileError(
                f"backend {backend!r} failed",
                why=failure,
                how="leave strict out to run the network uncompiled, or use another backend",
            ) from error
        warnings.warn(
            f"the network runs uncompiled, because the backend {backend!r} failed: {failure}",
            stacklevel=3,
        )
        compiled, backend, told = Compiled(copy, copy, asked.dtype), "eager", {}
        found = _tried(compiled, copy, args, kwargs)
    computed = asked.dtype or next((p.dtype for p in copy.parameters()), torch.get_default_dtype())
    difference = relative_error([t.to(e) for t, e in zip(found, expected, strict=True)], expected)
    compiled.report = CompileReport(changed, backend, told, computed, difference, failure)
    return compiled


def _tried(
    compiled: Compiled, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[torch.Tensor]:
    """What a compiled network answers; the network that it runs stays as it is."""
    with untouched(network):
        return [x.clone() for x in tensors_in(compiled(*args, **kwargs))]


def _options(backend: str, mode: str | None, options: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return what the backend is told, checked."""
    known = torch.compiler.list_backends(exclude_tags=())
    if backend not in known:
        raise OptionError(
            f"unknown backend {backend!r}", how=f"use one of {', '.join(sorted(known))}"
        )
    told = dict[str, Any](options or {})
    if backend != _INDUCTOR:
        if mode is not None:
            raise OptionError(
                f"mode={mode!r} works with backend='inductor' only", how="leave mode out"
            )
        return told
    return inductor_options(mode, told)
