"""ONNX, for runtimes other than torch."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import fx

from fxfuse.common.options import check_path
from fxfuse.common.output import atomic_file
from fxfuse.errors import CompileError, MissingDependencyError
from fxfuse.graph.example import first_line
from fxfuse.graph.tensors import tensors_in
from fxfuse.refine.fused import Fused
from fxfuse.runtime.inputs import resolve_inputs
from fxfuse.runtime.package import checked, exported
from fxfuse.runtime.prepare import answers_of

_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def export_onnx(
    network: Fused | fx.GraphModule,
    path: str | Path,
    example: Any = None,
) -> float:
    """Write a network as ONNX, and compare what onnxruntime makes of it with the network.

    After the eval passes of `fxfuse.compile`. An existing file is replaced, once the comparison
    holds; a partial one is never left.

    Args:
        network: What `fuse` or `prune` returned, or a graph module; it is left as it is.
        path: The file.
        example: Example inputs, as in `fxfuse.fuse`. None: those that it was fused with.

    Returns:
        Largest difference from the network's outputs on the example, relative to the largest.

    Raises:
        MissingDependencyError: onnx, onnxscript or onnxruntime is not installed.
        CompileError: The network cannot be written as ONNX, or does not answer alike there.
        CaptureError: `torch.export` rejected the members, so there is no graph.
    """
    check_path("path", path)
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        raise MissingDependencyError(
            f"ONNX needs {', '.join(missing)}", how='pip install "fxfuse[onnx]"'
        )
    module, given = resolve_inputs(network, example)
    args, kwargs = given.args, dict(given.kwargs)
    expected = answers_of(module, args, kwargs)
    program = exported(module, args, kwargs, given.dynamic_shapes)
    with atomic_file(path) as work:
        try:
            # The exporter reports its steps on standard output.
            with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.onnx.export(
                    program, (), str(work), dynamo=True, external_data=False, verbose=False
                )
            found = _run(work, args, kwargs)
        except Exception as error:
            raise CompileError(
                "the network cannot be written as ONNX",
                why=first_line(error),
                how="use fxfuse.package, which writes a file for torch's own runtime",
            ) from error
        difference = checked([f.to(e) for f, e in zip(found, expected, strict=True)], expected)
    return difference


def _run(path: Path, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    tensors = tensors_in((args, dict(kwargs)))
    names = [entry.name for entry in session.get_inputs()]
    given = {n: t.detach().cpu().numpy() for n, t in zip(names, tensors, strict=True)}
    return [torch.from_numpy(value) for value in session.run(None, given)]
