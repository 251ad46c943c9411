"""`fxfuse.compile`: eval passes first, then torch.compile, and a check of what came out."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch.utils.flop_counter import FlopCounterMode

from fxfuse.common.measure import race
from fxfuse.errors import CompileError, OptionError
from fxfuse.graph.example import first_line
from fxfuse.graph.run import untouched
from fxfuse.graph.tensors import tensors_in
from fxfuse.refine.fused import Fused
from fxfuse.runtime.candidates import ALL, EAGER, Candidate, by_rule, device_of, worth_measuring
from fxfuse.runtime.channels_last import ChannelsLast
from fxfuse.runtime.eval_form import EvalForm
from fxfuse.runtime.inference import Compiled, CompileReport, Frozen
from fxfuse.runtime.inputs import resolve_inputs
from fxfuse.runtime.prepare import answers_of, inductor_options, prepared
from fxfuse.runtime.quantize import check_quantize, quantise
from fxfuse.verify.check import relative_error

_INDUCTOR = "inductor"
#: Seconds for which the forms that may be the fastest are measured, all together.
_RUN_TIME = 1.0
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
    quantize: str | None = None,
    channels_last: bool | None = None,
    freeze: bool | None = None,
    tune: bool | None = None,
    strict: bool = False,
) -> Compiled:
    """Compile a network for inference, on the device that it is on.

    It works on a copy: writes the mode into the graph, removes dropout, folds batch norms, puts the
    channels of images innermost, and calls `torch.compile(fullgraph=True)`. Where the network's
    size does not tell that this pays, it is measured against plain `torch.compile` for a second.
    The result is run on the example inputs and compared with the network itself.

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
        quantize: Weights of linear layers in eight bits, by torchao: `int8` computes in `dtype`,
            `int8_dynamic` in eight bits, for which activations are quantised at every call.
        channels_last: Whether two-dimensional convolutions run with channels innermost. None: where
            weights are not frozen, since inductor chooses the layout of those itself.
        freeze: Whether inductor keeps the weights as constants, in the layout that suits it. None:
            on the CPU, for networks that take long enough for it to pay.
        tune: Whether to compile in every form and keep the one that runs the example fastest. None:
            only where it is close, and only those that may be the fastest. False: never.
        strict: Whether a backend that fails is an error. Otherwise a warning says why, and the
            network runs uncompiled.

    Returns:
        A module for inference with a `report`.

    Raises:
        CompileError: With `strict`: the backend failed. torchao rejects the network.
        MissingDependencyError: torchao is not installed.
        CaptureError: `torch.export` rejected the members, so there is no graph.
    """
    module, given = resolve_inputs(network, example)
    args, kwargs = given.args, dict(given.kwargs)
    told = _options(backend, mode, options)
    if dtype is not None and dtype not in DTYPES:
        raise OptionError(
            f"unsupported dtype {dtype}",
            how=f"use one of {', '.join(map(str, DTYPES))}; for eight bits, quantize='int8'",
        )
    check_quantize(quantize)
    if tune and (freeze is not None or channels_last is not None):
        raise OptionError(
            "tune=True contradicts freeze and channels_last",
            why="tuning chooses them",
            how="leave out either these options or tune",
        )
    with FlopCounterMode(display=False) as counter:
        expected = answers_of(module, args, kwargs)
    operations = counter.get_total_flops()
    rule = by_rule(device_of(module), operations, freeze, channels_last)
    if backend != _INDUCTOR:
        rule = rule._replace(freeze=False, channels_last=channels_last is not False)
    candidates = [rule]
    if tune:
        candidates = [one for one in ALL if backend == _INDUCTOR or not one.freeze]
    elif tune is None and freeze is channels_last is None and backend == _INDUCTOR:
        known = dtype in (None, torch.float32) and quantize is None
        candidates = worth_measuring(module, operations, rule, is_known=known)
    asked = _Asked(module, args, kwargs, expected, backend, told, dynamic, dtype, quantize, strict)
    compiled = _fastest(_compiled_each(asked, candidates), asked)
    compiled.example = given
    return compiled


@dataclass(frozen=True)
class _Asked:
    """What stays the same, whatever the form."""

    module: fx.GraphModule
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    expected: list[torch.Tensor]
    backend: str
    options: Mapping[str, Any]
    dynamic: bool | None
    dtype: torch.dtype | None
    quantize: str | None
    strict: bool


def _fastest(found: Sequence[Compiled], asked: _Asked) -> Compiled:
    """Return the network that runs the example fastest, with what was measured in its report."""
    if len(found) == 1:
        return found[0]
    with untouched(*(compiled.graph_module for compiled in found)):
        times = race(found, asked.args, asked.kwargs, _RUN_TIME)
    best = found[times.index(min(times))]
    measured = {own.report.form: ms for own, ms in zip(found, times, strict=True)}
    best.report = replace(best.report, measured=measured)
    return best


def _compiled_each(asked: _Asked, candidates: Sequence[Candidate]) -> list[Compiled]:
    """Return a network in all forms that differ; uncompiled where the backend fails at all."""
    found: list[Compiled] = []
    failures: list[tuple[str, Candidate]] = []
    seen: list[Candidate] = []
    for candidate in candidates:
        copy, changed = _prepared(asked, candidate)
        # Two forms are one where passes find nothing to do.
        form = candidate._replace(
            channels_last=ChannelsLast.__name__ in changed,
            passes=not candidate.compiled or any(name != EvalForm.__name__ for name in changed),
        )
        if form in seen:
            continue
        seen.append(form)
        try:
            found.append(_compiled(asked, form, copy, changed))
        # Backends raise whatever they like.
        except Exception as error:
            failure = first_line(getattr(error, "inner_exception", error))
            if asked.strict:
                raise CompileError(
                    f"backend {asked.backend!r} failed",
                    why=failure,
                    how="leave strict out to run the network uncompiled, or use another backend",
                ) from error
            failures.append((failure, candidate))
    if failures and all(compiled.report.form == EAGER.name for compiled in found):
        failure, candidate = failures[0]
        warnings.warn(
            f"the network runs uncompiled, because the backend {asked.backend!r} failed: {failure}",
            stacklevel=3,
        )
        candidate = candidate._replace(freeze=False, compiled=False)
        found = [_compiled(asked, candidate, *_prepared(asked, candidate))]
        found[0].report = replace(found[0].report, failure=failure)
    return found


def _prepared(asked: _Asked, candidate: Candidate) -> tuple[fx.GraphModule, tuple[str, ...]]:
    """Return a network in a form, not compiled yet, and the passes that changed it."""
    copy, changed = prepared(
        asked.module,
        asked.args,
        asked.kwargs,
        channels_last=candidate.channels_last,
        folded=candidate.passes,
    )
    if asked.dtype is not None:
        copy.to(asked.dtype)
    if asked.quantize is not None:
        quantise(copy, asked.quantize)
    return copy, changed


def _compiled(
    asked: _Asked, candidate: Candidate, copy: fx.GraphModule, changed: tuple[str, ...]
) -> Compiled:
    """Return a network in one form, compiled and compared."""
    run: Any = copy
    backend, told = "eager", dict[str, Any]()
    if candidate.compiled:
        backend, told = asked.backend, dict(asked.options)
        # Of the function alone: calling a module, too, takes as long as a small operator.
        run = torch.compile(
            copy.forward,
            fullgraph=True,
            dynamic=asked.dynamic,
            backend=backend,
            options=told or None,
        )
    if candidate.freeze:
        run, told = Frozen(run), {**told, "freezing": True}
    compiled = Compiled(copy, run, asked.dtype)
    found, expected = _tried(compiled, copy, asked.args, asked.kwargs), asked.expected
    computed = asked.dtype or next((p.dtype for p in copy.parameters()), torch.get_default_dtype())
    error = relative_error([t.to(e) for t, e in zip(found, expected, strict=True)], expected)
    compiled.report = CompileReport(
        changed, backend, told, computed, error, form=candidate.name, quantize=asked.quantize or ""
    )
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
