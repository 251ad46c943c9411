"""A fused network as a folder, and back: weights, graph and plan, none of them pickled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import fx

from fxfuse.api.archive import read_graph, write_graph
from fxfuse.api.result import FusionResult
from fxfuse.common.output import atomic_folder
from fxfuse.errors import CheckpointError, NoGraphError
from fxfuse.graph.capture import capture, export
from fxfuse.graph.eager import eval_mode
from fxfuse.graph.example import Example
from fxfuse.members.checkpoint import check_fit, read_state_dict, write_state_dict
from fxfuse.runtime.inputs import resolve_inputs
from fxfuse.transform.emit import FusedModule, emit

WEIGHTS, GRAPH, PLAN = "fused.safetensors", "graph.pt2", "plan.json"
#: What `save` writes.
FILES = (WEIGHTS, GRAPH, PLAN)


def save(
    network: FusionResult | fx.GraphModule,
    folder: str | Path,
    example: Any = None,
    *,
    force: bool = False,
) -> None:
    """Writes a network as a folder, whole or not at all.

    `fused.safetensors` holds the weights by `state_dict()` name; `graph.pt2` the graph in eval
    form with the same weights, which `torch.export.load` reads, too; and `plan.json` the plan,
    where there is one. Where torch.export refused the members, there is no graph.

    Args:
        network: What `fuse` or `prune` returned, its module after training, or a stack.
        folder: The folder.
        example: Example inputs, as in `fxfuse.fuse`. None: those that it was fused with.
        force: Whether a folder that holds nothing but such files may be replaced.

    Raises:
        OptionError: There are no example inputs.
        OutputError: Something is there already that may not be overwritten.
        OutputError: Another process is writing the folder.
        CaptureError: torch.export refuses the network.
    """
    with atomic_folder(folder, FILES, force=force) as work:
        write_network(network, work, example)


def write_network(
    network: FusionResult | fx.GraphModule,
    folder: Path,
    example: Any = None,
) -> tuple[str, ...]:
    """Writes the files of a network into a folder that is there; returns their names.

    Raises:
        As `save`.
    """
    written = [WEIGHTS]
    write_state_dict(folder / WEIGHTS, network.state_dict())
    if isinstance(network, FusionResult):
        (folder / PLAN).write_text(network.plan.to_json(), encoding="utf-8")
        written.append(PLAN)
    if not isinstance(network, FusionResult) or network.emitted:
        module, given = resolve_inputs(network, example)
        args, kwargs = given.args, dict(given.kwargs)
        with eval_mode(module):
            write_graph(export(module, args, kwargs, None), folder / GRAPH)
        written.append(GRAPH)
    return tuple(written)


def load(folder: str | Path) -> FusedModule:
    """Reads a network that `save` or `fxfuse fuse` wrote; nothing in the folder is unpickled.

    Args:
        folder: The folder.

    Returns:
        The network in eval mode, with the weights in `fused.safetensors`; `train()` and `eval()`
        work as before.

    Raises:
        CheckpointError: There is no such folder, or no network in it.
        NoGraphError: It holds weights only, since torch.export refused the members.
        CheckpointError: A file is damaged, or not what `save` writes.
        CheckpointError: The weights do not fit the graph.
    """
    folder = Path(folder)
    weights, graph = folder / WEIGHTS, folder / GRAPH
    if not weights.is_file():
        raise CheckpointError(
            f"{folder.name or folder} holds no fused network",
            where=str(folder),
            why=f"there is no {WEIGHTS} in it" if folder.is_dir() else "there is no such folder",
            how="name a folder that fxfuse.save or `fxfuse fuse` wrote",
        )
    if not graph.is_file():
        raise NoGraphError(
            f"{folder.name} holds weights and no graph",
            where=str(folder),
            why="torch.export refused the members, or graph.pt2 was taken away",
            how=f"load {WEIGHTS} into a model of the members' class",
        )
    exported = read_graph(graph)
    args, kwargs = exported.example_inputs or ((), {})
    program = capture(exported, Example(args, kwargs))
    state, own = read_state_dict(weights), program.state()
    check_fit(state, own, weights)
    for name, tensor in own.items():
        if state[name].dtype != tensor.dtype:
            raise CheckpointError(
                f"{WEIGHTS} holds another dtype than {GRAPH}",
                where=f"{name} in {weights}",
                why=f"it is {state[name].dtype}, the graph's is {tensor.dtype}",
                how="write the folder again with fxfuse.save",
            )
    # Tied names share one tensor.
    return emit(program, {name: state[program.canonical[name]] for name in program.names})
