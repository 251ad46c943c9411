"""Members that stay in their files: tensors are read one at a time, and let go again."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn
from torch.export import ExportedProgram

from fxfuse.errors import (
    CheckpointError,
    MemberError,
    OptionError,
)
from fxfuse.graph.capture import Program
from fxfuse.graph.eager import ALONE
from fxfuse.graph.same_network import check_constant
from fxfuse.graph.tensors import is_constant, named_tensors
from fxfuse.graph.torch_compat import original_module
from fxfuse.members.checkpoint import (
    Stored,
    check_fit,
    counter_like,
    load_tensors,
    restore_tied,
)

Network = nn.Module | ExportedProgram | Program


class StreamedState(Mapping[str, torch.Tensor]):
    """The tensors of a member by `state_dict()` name, each read from its file when it is asked for.

    A tensor of a `.safetensors` file is a view of the mapped file: only the pages that are used are
    read, and the mapping ends with the tensor. Nothing is kept.
    """

    def __init__(self, names: Mapping[str, str | None], stored: Stored, like: Program) -> None:
        self._names = names
        self._stored = stored
        self._like = like

    def __getitem__(self, name: str) -> torch.Tensor:
        """Read a tensor."""
        held, own = self._names[name], self._like.tensor(name)
        tensor = counter_like(own) if held is None else self._stored.read(held)
        if tensor.dtype != own.dtype:
            raise CheckpointError(
                f"{self._stored.path.name} holds other dtypes than the first checkpoint",
                where=f"{name} in {self._stored.path}",
                why=f"it is {tensor.dtype}, the first checkpoint's is {own.dtype}",
                how="convert the checkpoints to one dtype",
            )
        return tensor.to(own.device)

    def __contains__(self, name: object) -> bool:
        """Tell whether there is such a tensor; it is not read."""
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def first_member(template: nn.Module, path: str | Path, weights: str | None = None) -> nn.Module:
    """Return a copy of a template with the weights of a checkpoint; `weights` as in `Stored`."""
    template = original_module(template)
    stored = Stored(path, template.state_dict(keep_vars=True), weights).log()
    return with_tensors(template, {name: stored.read(name) for name in stored.shapes()}, path)


def with_tensors(
    template: nn.Module, tensors: dict[str, torch.Tensor], source: str | Path
) -> nn.Module:
    """A copy of a template with other tensors; `source` says in messages where they are from."""
    with ALONE:
        made = copy.deepcopy(template)
    if any(tensor.is_meta for tensor in (*made.parameters(), *made.buffers())):
        check_buffers(made)
        _materialise(made)
    load_tensors(made, tensors, source)
    return made


def streamed_states(
    paths: Sequence[str | Path], first: Program, weights: str | None = None
) -> list[Mapping[str, torch.Tensor]]:
    """The tensors of all members: the first one's from memory, the others' from their files."""
    others = enumerate(paths[1:], start=1)
    return [first.state(), *(streamed_state(p, n, first, weights) for n, p in others)]


def streamed_state(
    path: str | Path, number: int, first: Program, weights: str | None = None
) -> StreamedState:
    """Return the tensors of a member other than the first, from its file."""
    own = {name: first.tensor(name) for name in first.names}
    read = {str(node.target) for node in first.graph.nodes if node.op == "get_attr"}
    stored = Stored(path, own, weights).log()
    shapes = stored.shapes()
    known = set(shapes)
    restore_tied(shapes, own)
    check_fit(shapes, own, path)
    names = _stored_names(known, first)
    state = StreamedState(names, stored, first)
    for name in read & own.keys():
        if is_constant(own[name]) and first.canonical[name] not in first.written:
            check_constant(name, own[name], state[name], number, stored=True)
    return state


def split_paths(
    members: Sequence[Network | str | Path], template: nn.Module | None
) -> tuple[list[str | Path], list[Network]]:
    """Return the members that are files, or those that are networks: one of the two is empty."""
    files = [member for member in members if isinstance(member, str | Path)]
    networks = [member for member in members if not isinstance(member, str | Path)]
    if files and networks:
        raise OptionError(
            "some members are files and some are networks",
            why="files are read tensor by tensor, and networks are in memory",
            how="load the files into networks, or save the networks",
        )
    if files and template is None:
        raise OptionError(
            "files need a template",
            why="they hold tensors, but no network",
            how="pass Members.from_files(paths, template), where template is a module of the "
            "members' class; it may be on the meta device",
        )
    if template is not None and not files:
        raise OptionError(
            "template= is for members in files", how="leave template= out, or pass paths"
        )
    return files, networks


def _stored_names(known: set[str], first: Program) -> dict[str, str | None]:
    """Return under which name each tensor is stored; None: a counter that is not.

    A tied one may be there under another name.
    """
    # Of several, the one that loading a module would write last.
    last = {first.canonical[name]: name for name in first.names if name in known}
    return {name: last.get(first.canonical[name]) for name in first.names}


def _materialise(module: nn.Module) -> None:
    """Give tensors on the meta device memory; those that are tied stay so."""
    made: dict[int, torch.Tensor] = {}

    def real(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_meta:
            return tensor
        if id(tensor) not in made:
            empty = torch.empty_like(tensor, device="cpu")
            trains = tensor.requires_grad
            keeps = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(empty, requires_grad=trains) if keeps else empty
        return made[id(tensor)]

    for own in module.modules():
        for name, tensor in list(named_tensors(own, recurse=False)):
            setattr(own, name, real(tensor))


def tied_parameters(
    module: nn.Module, state: Mapping[str, torch.Tensor]
) -> dict[str, nn.Parameter]:
    """Return a module's parameters with the values of `state`; those that are tied are one."""
    made: dict[int, nn.Parameter] = {}
    found = {}
    for name, own in module.named_parameters(remove_duplicate=False):
        if name in state:
            if id(own) not in made:
                made[id(own)] = nn.Parameter(state[name], requires_grad=own.requires_grad)
            found[name] = made[id(own)]
    return found


def check_buffers(module: nn.Module) -> None:
    """Check that whatever no checkpoint holds has values."""
    stored = module.state_dict().keys()
    for name, buffer in module.named_buffers(remove_duplicate=False):
        if buffer.is_meta and name not in stored:
            raise MemberError(
                "there are no values for a buffer that no checkpoint holds",
                where=name,
                why="the buffer is not saved with the weights, and it is on the meta device",
                how="build the network on the CPU, or only the module that has the buffer",
            )
