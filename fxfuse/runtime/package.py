"""Packages: a network compiled ahead of time, in one file that runs without its Python code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from fxfuse.common.options import check_path
from fxfuse.common.output import atomic_file
from fxfuse.errors import CheckpointError, CompileError, OptionError
from fxfuse.graph import torch_compat
from fxfuse.graph.capture import export
from fxfuse.graph.example import Example, first_line
from fxfuse.graph.tensors import tensors_in
from fxfuse.refine.fused import Fused
from fxfuse.runtime.inference import Compiled, CompileReport
from fxfuse.runtime.inputs import resolve_inputs
from fxfuse.runtime.prepare import answers_of, prepared
from fxfuse.verify.check import relative_error

#: Largest difference from the network itself that a package may have, by its precision.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
_LOW_PRECISION = 5e-2


def package(
    network: Fused | fx.GraphModule | Compiled,
    path: str | Path,
    example: Any = None,
    *,
    options: Mapping[str, Any] | None = None,
) -> float:
    """Compile a network ahead of time, through AOTInductor, for the device that it is on.

    After the eval passes of `fxfuse.compile`. The package is loaded and compared with the network
    before it takes its place; an existing file is replaced, and a partial one is never left.

    Args:
        network: What `fuse` or `prune` returned, or a graph module; it is left as it is. What
            `fxfuse.compile` returned is packaged in the form that was chosen there, in the same
            precision, and the package's `get_metadata()` says which.
        path: The file, `.pt2`.
        example: Example inputs, as in `fxfuse.fuse`. None: those that it was fused or compiled
            with.
        options: Of inductor.

    Returns:
        Largest difference from the network's outputs on the example, relative to the largest.

    Raises:
        CompileError: The network cannot be compiled ahead of time, or the package does not answer
            like the network.
        CaptureError: `torch.export` rejects the network, or rejected the members.
    """
    check_path("path", path)
    path = Path(path)
    if path.suffix != ".pt2":
        raise OptionError(
            f"the path of a package must end in .pt2, got {path.name}",
            where="path",
            how=f"use {path.with_suffix('.pt2').name}",
        )
    program, expected, given, told = _program(network, example)
    args, kwargs = given.args, dict(given.kwargs)
    with atomic_file(path) as work:
        try:
            torch_compat.write_package(program, str(work), {**told, **(options or {})})
            found = tensors_in(load_package(work)(*args, **kwargs))
        except (CheckpointError, OSError):
            raise
        except Exception as error:
            raise CompileError(
                "the network cannot be compiled ahead of time",
                why=first_line(error),
                how="install a C++ compiler for AOTInductor, or use fxfuse.compile",
            ) from error
        low = isinstance(network, Compiled) and _is_low(network.report)
        difference = checked(found, expected, _LOW_PRECISION if low else 0.0)
    return difference


def _is_low(report: CompileReport) -> bool:
    """Tell whether a network computes in low precision, so that its answers are off for that."""
    low = report.dtype not in _TOLERANCE or bool(report.quantize)
    return low and report.error > _TOLERANCE[torch.float32]


def _program(
    network: Fused | fx.GraphModule | Compiled, example: Any
) -> tuple[ExportedProgram, list[torch.Tensor], Example, dict[str, Any]]:
    """Return what is packaged, what it answers, the example inputs, and what inductor is told."""
    if isinstance(network, Compiled):
        given, report = network.example if example is None else Example.of(example), network.report
        uncompiled = network.uncompiled()
        args, kwargs = given.args, dict(given.kwargs)
        expected = answers_of(uncompiled, args, kwargs)
        form = {"form": report.form, "dtype": str(report.dtype), **report.measured}
        told = {**report.options, "aot_inductor.metadata": {n: str(x) for n, x in form.items()}}
        return export(uncompiled, args, kwargs, given.dynamic_shapes), expected, given, told
    module, given = resolve_inputs(network, example)
    args, kwargs = given.args, dict(given.kwargs)
    expected = answers_of(module, args, kwargs)
    return exported(module, args, kwargs, given.dynamic_shapes), expected, given, {}


def load_package(path: str | Path) -> Callable[..., Any]:
    """Load what `package` wrote.

    A package holds compiled code: load only what you trust.

    Args:
        path: The file.

    Returns:
        A callable that takes and returns what the network does.

    Raises:
        CheckpointError: The file does not exist, or is not a package.
    """
    check_path("path", path)
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(
            f"the package {path.name} does not exist", where=str(path), how="check the path"
        )
    try:
        return torch_compat.load_package(str(path))
    # The loader has no error class of its own.
    except Exception as error:
        raise CheckpointError(
            f"{path.name} is not a package",
            where=str(path),
            why=first_line(error),
            how="make it again with fxfuse.package, with this version of torch",
        ) from error


def exported(
    module: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any
) -> ExportedProgram:
    """The inference graph as a program of torch.export, with a dynamic batch where that can be."""
    copy, _ = prepared(module, args, kwargs, channels_last=False)
    return export(copy, args, kwargs, dynamic_shapes)


def checked(
    found: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float = 0.0
) -> float:
    """Return how far outputs are from those of the network itself; `tolerance` at least passes."""
    error = relative_error(found, expected)
    allowed = max(tolerance, *(_TOLERANCE.get(t.dtype, _LOW_PRECISION) for t in expected))
    if error > allowed:
        raise CompileError(
            "the compiled network does not answer like the network, and is not written",
            why=f"the relative error on the example is {error:.2e}, {allowed:.0e} is allowed",
            how="report the network",
        )
    return error
