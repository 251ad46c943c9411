"""Members that stay in their files: tensors are read one at a time, and let go again."""

from __future__ import annotations

import copy
import json
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
from fxfuse.graph.same_network import check_constant
from fxfuse.graph.tensors import floating_dtype, is_constant, named_tensors
from fxfuse.members.checkpoint import (
    check_fit,
    corrupt,
    load_tensors,
    missing,
    read_state_dict,
    restore_tied,
)
from fxfuse.members.tensor_file import TensorFile

Network = nn.Module | ExportedProgram | Program

#: Ends of the names of files that are read tensor by tensor.
_SAFETENSORS, _INDEX = ".safetensors", ".index.json"


class StreamedState(Mapping[str, torch.Tensor]):
    """The tensors of a member by `state_dict()` name, each read from its file when it is asked for.

    A tensor of a `.safetensors` file is a view of the mapped file: only the pages that are used are
    read, and the mapping ends with the tensor. Nothing is kept.
    """

    def __init__(self, names: Mapping[str, str], stored: Stored, like: Program) -> None:
        self._names = names
        self._stored = stored
        self._like = like

    def __getitem__(self, name: str) -> torch.Tensor:
        """Read a tensor."""
        tensor, own = self._stored.read(self._names[name]), self._like.tensor(name)
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


class Stored:
    """A checkpoint: what it holds, and how a tensor of it is read.

    Args:
        path: A `.safetensors` file, the index of several (`*.safetensors.index.json`), or a
            weights-only `.pt` file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._held: dict[str, torch.Tensor] = {}
        self._files: dict[str, TensorFile] = {}
        if self.path.name.endswith(_INDEX):
            self._files = _shards(self.path)
        elif self.path.suffix == _SAFETENSORS:
            file = TensorFile(self.path)
            self._files = dict.fromkeys(file.shapes, file)
        else:
            # A .pt file is mapped as a whole: its pages are the system's to keep or to drop.
            self._held = read_state_dict(self.path, mmap=True)

    def shapes(self) -> dict[str, torch.Tensor]:
        """Return for each tensor one without content, of its shape."""
        if self._held:
            return {name: t.to("meta") for name, t in self._held.items()}
        return {
            name: torch.empty(file.shapes[name], device="meta")
            for name, file in self._files.items()
        }

    def dtype(self) -> torch.dtype:
        """That of the numbers in it, as `floating_dtype` says."""
        return floating_dtype(self.read(name) for name in self.shapes())

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor, on the CPU."""
        if self._held:
            return self._held[name]
        return self._files[name].read(name)


def first_member(template: nn.Module, path: str | Path) -> nn.Module:
    """Return a copy of a template with the weights of a checkpoint."""
    stored = Stored(path)
    return with_tensors(template, {name: stored.read(name) for name in stored.shapes()}, path)


def with_tensors(
    template: nn.Module, tensors: dict[str, torch.Tensor], source: str | Path
) -> nn.Module:
    """A copy of a template with other tensors; `source` says in messages where they are from."""
    made = copy.deepcopy(template)
    if any(tensor.is_meta for tensor in (*made.parameters(), *made.buffers())):
        _check_buffers(made)
        _materialise(made)
    load_tensors(made, tensors, source)
    return made


def streamed_states(
    paths: Sequence[str | Path], first: Program
) -> list[Mapping[str, torch.Tensor]]:
    """The tensors of all members: the first one's from memory, the others' from their files."""
    others = enumerate(paths[1:], start=1)
    return [first.state(), *(streamed_state(path, number, first) for number, path in others)]


def streamed_state(path: str | Path, number: int, first: Program) -> StreamedState:
    """Return the tensors of a member other than the first, from its file."""
    own = {name: first.tensor(name) for name in first.names}
    read = {str(node.target) for node in first.graph.nodes if node.op == "get_attr"}
    stored = Stored(path)
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
            "files need template=",
            why="they hold tensors, but no network",
            how="pass template=, a module of the members' class; it may be on the meta device",
        )
    if template is not None and not files:
        raise OptionError(
            "template= is for members in files", how="leave template= out, or pass paths"
        )
    return files, networks


def _stored_names(known: set[str], first: Program) -> dict[str, str]:
    """Return under which name each tensor is stored; a tied one may be there under another."""
    # Of several, the one that loading a module would write last.
    last = {first.canonical[name]: name for name in first.names if name in known}
    return {name: last[first.canonical[name]] for name in first.names}


def _shards(index: Path) -> dict[str, TensorFile]:
    """Return the files of a sharded checkpoint, by tensor."""
    try:
        content = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {str(name): str(file) for name, file in content.items()}
    except OSError as error:
        raise missing(index, error) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise corrupt(index, f"it holds no weight_map ({type(error).__name__})") from error
    for name, file in files.items():
        if Path(file).name != file or file in ("", ".", ".."):
            raise corrupt(index, f"it places {name} in {file!r}, outside its folder")
    shards: dict[str, TensorFile] = {}
    for file in dict.fromkeys(files.values()):
        shards[file] = TensorFile(index.parent / file)
        held = shards[file].shapes
        lacking = next((n for n, f in files.items() if f == file and n not in held), None)
        if lacking is not None:
            raise corrupt(index, f"{file} lacks {lacking}")
    return {name: shards[file] for name, file in files.items()}


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


def _check_buffers(module: nn.Module) -> None:
    """Check that whatever no checkpoint holds has values."""
    stored = module.state_dict().keys()
    for name, buffer in module.named_buffers(remove_duplicate=False):
        if buffer.is_meta and name not in stored:
            raise MemberError(
                "the template has no values for a buffer that no checkpoint holds",
                where=name,
                why="the buffer is not saved with the weights, and it is on the meta device",
                how="build the template on the CPU",
            )
