"""A fused network as a folder, and back: weights, graph and plan, all of them plain data."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Collection
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import fx, nn
from torch.export import ExportedProgram

from fxfuse.api.result import FusionResult
from fxfuse.common.options import check_path
from fxfuse.common.output import atomic_folder
from fxfuse.errors import CheckpointError
from fxfuse.graph.capture import capture
from fxfuse.graph.capture import export as export_program
from fxfuse.graph.example import Example
from fxfuse.graph.graph_file import StoredGraph, read_graph, write_graph
from fxfuse.graph.run import untouched
from fxfuse.graph.tensors import attach, named_tensors
from fxfuse.members.checkpoint import check_fit, read_state_dict, write_state_dict
from fxfuse.members.tensor_file import TensorFile, check_header
from fxfuse.members.torch_file import corrupt, missing
from fxfuse.runtime.inputs import resolve_inputs
from fxfuse.transform.emit import FusedModule, emit

WEIGHTS, CONSTANTS = "fused.safetensors", "constants.safetensors"
GRAPH, PLAN, EXPORTED = "graph.json", "plan.json", "graph.pt2"
#: What `save` writes, not all of it for every network.
FILES = (WEIGHTS, CONSTANTS, GRAPH, PLAN, EXPORTED)


def save(
    network: FusionResult | fx.GraphModule | ExportedProgram,
    folder: str | Path,
    example: Any = None,
    *,
    export: bool = False,
    force: bool = False,
) -> None:
    """Write a network as a folder of plain data, whole or not at all.

    `fused.safetensors` holds the weights by `state_dict()` name, `graph.json` the graph, and
    `plan.json` the plan, where there is one. Tensors of the graph that are not in the
    `state_dict()` are in `constants.safetensors`. Where torch.export rejected the members, there is
    no graph.

    Args:
        network: What `fuse` or `prune` returned, its module after training, or a stack. Another
            graph module or an exported program is captured first.
        folder: The folder.
        example: Example inputs, as in `fxfuse.fuse`, with which a graph module that fxfuse did not
            make is captured and `export` exports. None: those that it was fused with.
        export: Whether to write `graph.pt2` as well, the eval form with the weights for
            `torch.export.load` in other programs. `load` never reads it.
        force: Whether a folder that holds nothing but such files may be replaced.

    Raises:
        OptionError: This is not a fused network, or there are no example inputs where they are
            needed.
        RewriteError: The graph cannot be written as plain data; says what to rename.
        OutputError: The folder exists and may not be replaced, or another process is writing it.
        CaptureError: torch.export rejects the network.
    """
    with atomic_folder(folder, FILES, force=force) as work:
        write_network(network, work, example, export=export)


def write_network(
    network: FusionResult | fx.GraphModule | ExportedProgram,
    folder: Path,
    example: Any = None,
    *,
    export: bool = False,
) -> None:
    """Write the files of a network into a folder that exists."""
    if isinstance(network, FusionResult):
        (folder / PLAN).write_text(network.plan.to_json(), encoding="utf-8")
        if not network.emitted:
            write_state_dict(folder / WEIGHTS, network.state_dict())
            return
    module = _emitted(network, example)
    write_state_dict(folder / WEIGHTS, module.state_dict())
    write_graph(module, folder / GRAPH, _write_constants(module, folder / CONSTANTS))
    if export:
        given = module if isinstance(network, ExportedProgram) else network
        _, wanted = resolve_inputs(given, example)
        args, kwargs = wanted.args, dict(wanted.kwargs)
        with untouched(module):
            _write_export(export_program(module, args, kwargs, None), folder / EXPORTED)


def load(folder: str | Path, *, allow: Collection[str] = ()) -> FusedModule:
    """Read a network that `save` or `fxfuse fuse` wrote.

    Nothing that a file says is unpickled, imported, run or evaluated.

    Args:
        folder: The folder.
        allow: Names of libraries, such as "mylib", whose operators (`torch.library`) and output
            classes the graph may use beside torch's own. They must be registered in this process.

    Returns:
        The network in eval mode, with the weights in `fused.safetensors`; `train()` and `eval()`
        work as before.

    Raises:
        CheckpointError: The folder holds no network, no graph or one of an earlier format, a file
            is damaged or not what `save` writes, or the weights do not fit the graph.
    """
    check_path("folder", folder)
    folder = Path(folder)
    _check_files(folder)
    stored = read_graph(folder / GRAPH, allow)
    state = _read_tensors(folder, stored)
    module = FusedModule({}, fx.Graph())
    made: dict[str, torch.Tensor] = {}
    for name, told in stored.tensors.items():
        first = told.tied_to or name
        if first not in made:
            tensor = state[first].requires_grad_(told.requires_grad)
            if told.kind == "parameter":
                tensor = nn.Parameter(tensor, requires_grad=told.requires_grad)
            made[first] = tensor
        attach(module, name, made[first], persistent=told.kind != "constant")
    module.graph = stored.graph
    module.eval()
    return module


def _emitted(
    network: FusionResult | fx.GraphModule | ExportedProgram,
    example: Any,
) -> FusedModule:
    if isinstance(network, FusionResult):
        return network.module
    if isinstance(network, FusedModule):
        return network
    if isinstance(network, ExportedProgram):
        given = Example(*(network.example_inputs or ((), {})))
    else:
        _, given = resolve_inputs(network, example)
    program = capture(network, given, fallback=False)
    return emit(program, program.state())


def _write_constants(module: FusedModule, path: Path) -> str:
    """Write the tensors outside the `state_dict()`, if any; return the file's SHA-256, or ""."""
    kept = module.state_dict()
    constants = {name: tensor for name, tensor in named_tensors(module) if name not in kept}
    if not constants:
        return ""
    write_state_dict(path, constants)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _write_export(program: ExportedProgram, path: Path) -> None:
    """Write a program for `torch.export.load`, without names of the user's files."""
    for node in program.graph_module.graph.nodes:
        node.meta = {"val": node.meta["val"]} if "val" in node.meta else {}
    # On a full disk torch's own writer ends the process.
    content = io.BytesIO()
    torch.export.save(program, content)
    path.write_bytes(content.getbuffer())


def _check_files(folder: Path) -> None:
    if not (folder / WEIGHTS).is_file():
        raise CheckpointError(
            f"{folder.name or folder} holds no fused network",
            where=str(folder),
            why=f"there is no {WEIGHTS} in it" if folder.is_dir() else "there is no such folder",
            how="use a folder that fxfuse.save or `fxfuse fuse` wrote",
        )
    if (folder / GRAPH).is_file():
        return
    if (folder / EXPORTED).is_file():
        raise CheckpointError(
            f"{folder.name} is of an earlier format",
            where=str(folder),
            why=f"its graph is in {EXPORTED} alone, which is never read: such a file can run code",
            how=f'where you trust it, write it again: fxfuse.save(torch.export.load("{EXPORTED}"), '
            '"another folder")',
        )
    raise CheckpointError(
        f"{folder.name} holds weights, but no graph",
        where=str(folder),
        why=f"torch.export rejected the members, or {GRAPH} was removed",
        how=f"load {WEIGHTS} into a model of the members' class",
    )


def _read_tensors(folder: Path, stored: StoredGraph) -> dict[str, torch.Tensor]:
    """Read the tensors of a network; names and shapes are compared before any is read."""
    kept = {name: told for name, told in stored.tensors.items() if told.kind != "constant"}
    weights, constants = folder / WEIGHTS, folder / CONSTANTS
    check_fit(TensorFile(weights).entries, kept, weights)
    state = read_state_dict(weights)
    others = stored.tensors.keys() - kept.keys()
    if others:
        found = _read_constants(constants, stored.constants)
        check_fit(found, {name: stored.tensors[name] for name in others}, constants)
        state |= found
    for name, told in stored.tensors.items():
        if str(state[name].dtype) != f"torch.{told.dtype}":
            path = weights if name in kept else constants
            raise CheckpointError(
                f"{path.name} holds another dtype than {GRAPH}",
                where=f"{name} in {path}",
                why=f"it is {state[name].dtype}, the graph's is {told.dtype}",
                how="write the folder again with fxfuse.save",
            )
    return state


def _read_constants(path: Path, digest: str) -> dict[str, torch.Tensor]:
    # A pipe or a device could have no end.
    check_header(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise missing(path, error) from error
    if hashlib.sha256(content).hexdigest() != digest:
        raise corrupt(path, "it is not the file that belongs to this graph")
    try:
        return safetensors.torch.load(content)
    except SafetensorError as error:
        raise corrupt(path, str(error)) from error
