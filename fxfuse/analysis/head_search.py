"""Where the members' classes stand: the dimension of the output, and the layers that write it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from torch import fx

from fxfuse.analysis.constraints import Constraints, names_under
from fxfuse.analysis.coupling import couple
from fxfuse.analysis.label_spaces import Heads
from fxfuse.analysis.labels import AbstractTensor, neurons
from fxfuse.errors import OptionError
from fxfuse.graph.capture import Program

_HOW = "name in heads= the modules that write the logits"


def find_heads(members: Sequence[Program], heads: Heads) -> tuple[Heads, int]:
    """The heads whose outputs become one tensor, and the dimension of that tensor that is classes.

    A head that is to be found consists of the modules whose parameters have an index for each
    class.

    Returns:
        The same with the modules named, and the dimension.
    """
    for member in members:
        member.require_exported()
    outputs = [_output(member) for member in members]
    shapes = [output.meta["val"].shape for output in outputs]
    ranks = {len(shape) for shape in shapes}
    if len(ranks) != 1:
        raise OptionError(
            "the members' outputs differ in their number of dimensions",
            why=f"they have {', '.join(map(str, sorted(ranks)))}",
            how="use the output 'tuple', which returns them one by one",
        )
    (rank,) = ranks
    sizes = [[shape[dim] for shape in shapes] for dim in range(rank)]
    differing = [
        d for d in range(rank) if all(isinstance(s, int) for s in sizes[d]) and len({*sizes[d]}) > 1
    ]
    writers: dict[int, set[str]] = {}
    for member, output in zip(members, outputs, strict=True):
        # A dimension of size 1 has no labels: of one class, another member knows more.
        writers = writers or _writers(member, output)
    patterns = heads.modules
    if patterns:
        inside = {n for p in patterns for n in names_under(members[0].names, p, "heads")}
        writers = {dim: names & inside for dim, names in writers.items() if names & inside}
    found = [dim for dim in writers if dim in differing] or sorted(writers)
    if patterns and not found:
        found = differing or ([1] if rank == 2 else [])
    if len(found) != 1:
        raise OptionError(
            "the output's dimension of classes is ambiguous"
            if found
            else "no dimension of the output is written by a layer, index by index",
            where=f"{outputs[0].name}, of {rank} dimensions",
            why="parameters have an index for each place along "
            + (f"dimensions {', '.join(map(str, found))}" if found else "none of them"),
            how=_HOW,
        )
    (dim,) = found
    heads.check_counts([int(size) for size in sizes[dim]])
    modules = {name.rpartition(".")[0] or name for name in writers.get(dim, ())}
    return replace(heads, modules=patterns or tuple(sorted(modules))), dim


def _output(member: Program) -> fx.Node:
    tensors = [node for node in member.outputs() if isinstance(node, fx.Node)]
    if len(tensors) == 1:
        return tensors[0]
    raise OptionError(
        f"a member must return one tensor, got {len(tensors)}",
        why="the logits of all members become one tensor",
        how="use the output 'tuple', or wrap the networks in a module that returns the logits",
    )


def _writers(member: Program, output: fx.Node) -> dict[int, set[str]]:
    """For each dimension of the output, the tensors that have an index for each place along it."""
    graph = couple(member, Constraints())
    component = graph.coupling.components()
    value = graph.values[output]
    found: dict[int, set[str]] = defaultdict(set)
    for f in value.fields if isinstance(value, AbstractTensor) else ():
        here = component[neurons(f.bare).reshape(-1).numpy()]
        if len(f.dims) != 1 or len(np.unique(here)) < len(here):
            continue
        for owner, (name, _) in enumerate(graph.coupling.owners):
            ids = graph.coupling.ids_of(owner)
            if name in member.canonical and np.isin(component[ids], here).any():
                found[f.dims[0]].add(name)
    return dict(found)
