"""Graphs as plain data: `graph.json`, written, read and checked.

Reading runs nothing that the file names. Operators come from an allow list, the graph is rebuilt
node by node, and a text of the file reaches torch.fx, which writes Python of a graph, only as a
checked name or as a literal. What is read must be, letter for letter, what would be written of it.
Tensors lie in other files; of each the graph file holds name, kind, dtype and shape.
"""

from __future__ import annotations

import hashlib
import json
import keyword
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import fx, nn

from fxfuse.common.output import MARK
from fxfuse.errors import CheckpointError, RewriteError
from fxfuse.graph.allowed import LIBRARIES, excess, find_operator, is_call, name_of, registered_in
from fxfuse.graph.plain_data import (
    NotPlainError,
    check_limits,
    from_data,
    from_structure,
    to_data,
    to_structure,
)
from fxfuse.graph.tensors import named_tensors
from fxfuse.graph.torch_compat import set_signature, signature_of

_VERSION = 1
#: Most bytes of a file, nodes of a graph, and characters of a name.
_BYTES, _NODES, _NAME = 1 << 24, 40_000, 200
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
#: Parts of a tensor's name: an attribute, or the number or key of a submodule.
_PART = re.compile(r"[A-Za-z0-9_-]+")
_PARAMETER, _BUFFER, _CONSTANT = "parameter", "buffer", "constant"
_OPS = {"placeholder": "input", "get_attr": "tensor", "call_function": "call", "output": "output"}
#: What a tensor node reads that follows the module's mode.
_TRAINING = "training"

_dumps = partial(json.dumps, allow_nan=False)


@dataclass(frozen=True)
class StoredTensor:
    """What a graph file says of a tensor.

    Attributes:
        kind: "parameter", "buffer", or "constant", which is a buffer outside the `state_dict()`.
        dtype: Its dtype, such as "float32".
        tied_to: The name under which the same tensor comes first, or "".
    """

    kind: str
    dtype: str
    shape: tuple[int, ...]
    requires_grad: bool
    tied_to: str = ""


@dataclass(frozen=True)
class StoredGraph:
    """What a graph file holds.

    Attributes:
        graph: The graph; it follows the mode of its module.
        tensors: Its tensors by name, in the order of `state_dict()`, constants last.
        constants: SHA-256 of the file that holds the constants, or "".
    """

    graph: fx.Graph
    tensors: Mapping[str, StoredTensor]
    constants: str


def write_graph(module: fx.GraphModule, path: Path, constants: str = "") -> None:
    """Write the graph of a module, and what its tensors are.

    `constants` is the SHA-256 of the file that holds the constants.
    """
    try:
        text = _write(_content(StoredGraph(module.graph, _describe_tensors(module), constants)))
        # Names and limits are checked now, not when it is too late.
        _parse(text, allow=None)
    except NotPlainError as error:
        raise RewriteError(
            "the network cannot be written as plain data",
            where=path.name,
            why=error.why,
            how=error.saving or "change the network so that its graph does without it",
        ) from error
    path.write_bytes(text)


def read_graph(path: Path, allow: Collection[str] = ()) -> StoredGraph:
    """Read a graph that `write_graph` wrote.

    `allow` names libraries beside torch's whose operators and output classes the graph may use;
    they are registered in this process already.
    """
    try:
        with path.open("rb") as file:
            text = file.read(_BYTES + 1)
        return _parse(text, allow)
    except OSError as error:
        raise CheckpointError(
            f"cannot open the graph {path.name}",
            where=str(path),
            why=error.strerror or str(error),
            how="check the path and its permissions",
        ) from error
    except NotPlainError as error:
        raise CheckpointError(
            f"{path.name} is not a graph that fxfuse wrote",
            where=str(path),
            why=error.why,
            how=error.loading or "copy the folder again, or write it again with fxfuse.save",
        ) from error


def _describe_tensors(module: fx.GraphModule) -> dict[str, StoredTensor]:
    persistent = module.state_dict(keep_vars=True)
    first: dict[tuple[int, bool], str] = {}
    found: dict[str, StoredTensor] = {}
    for name, tensor in {**persistent, **dict(named_tensors(module))}.items():
        kept = name in persistent
        kind = _PARAMETER if isinstance(tensor, nn.Parameter) else _BUFFER if kept else _CONSTANT
        dtype = str(tensor.dtype).removeprefix("torch.")
        told = StoredTensor(kind, dtype, tuple(tensor.shape), tensor.requires_grad)
        other = first.setdefault((id(tensor), kept), name)
        found[name] = told if other == name else replace(told, tied_to=other)
    return found


def _content(stored: StoredGraph) -> dict[str, Any]:
    """Return all that a graph file holds but its checksum."""
    names, inputs, outputs = signature_of(stored.graph)
    return {
        "note": MARK,
        "fxfuse_graph": _VERSION,
        "arguments": names,
        "inputs": to_structure(inputs),
        "outputs": to_structure(outputs),
        "constants": stored.constants,
        "tensors": {
            name: {key: value for key, value in asdict(told).items() if value != ""}
            for name, told in stored.tensors.items()
        },
        "nodes": [_node_content(node) for node in stored.graph.nodes],
    }


def _node_content(node: fx.Node) -> dict[str, Any]:
    told: dict[str, Any] = {} if node.op == "output" else {"name": node.name}
    told["op"] = _OPS.get(node.op)
    if node.op != "output":
        told["target"] = name_of(node.target) if node.op == "call_function" else str(node.target)
    if told["op"] is None or told.get("target", "") is None:
        raise NotPlainError(f"{node.name} is a {node.op} of {node.target}, which has no plain form")
    args = [to_data(argument) for argument in node.args]
    kwargs = {key: to_data(value) for key, value in node.kwargs.items()}
    return told | ({"args": args} if args else {}) | ({"kwargs": kwargs} if kwargs else {})


def _write(content: Mapping[str, Any]) -> bytes:
    """The text of a file: one line for each tensor and node, so that people can compare them."""
    head = {"sha256": _digest(content), **content}
    tensors, nodes = head.pop("tensors"), head.pop("nodes")
    lines = [f"{_dumps(key)}: {_dumps(value)}" for key, value in head.items()]
    table = ",\n".join(f"{_dumps(key)}: {_dumps(value)}" for key, value in tensors.items())
    steps = ",\n".join(map(_dumps, nodes))
    lines += [f'"tensors": {{\n{table}\n}}', f'"nodes": [\n{steps}\n]']
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(_dumps(content).encode()).hexdigest()


def _parse(text: bytes, allow: Collection[str] | None) -> StoredGraph:
    """Read the text of a file; `allow` is None where every library is allowed."""
    if len(text) > _BYTES:
        raise NotPlainError(f"it is larger than {_BYTES >> 20} MiB")
    try:
        content = json.loads(text)
        _check(isinstance(content, dict), "it is no object")
        version, digest = content.get("fxfuse_graph"), content.pop("sha256", None)
        if version != _VERSION:
            raise NotPlainError(
                f"it is of version {version!r:.20} of the format, and {_VERSION} is read here",
                loading="load it with the version of fxfuse that wrote it",
            )
        check_limits(content)
        _check(digest == _digest(content), "its checksum is wrong: it is damaged or was edited")
        stored = _Reader(content, allow).stored
        same = _dumps(_content(stored)) == _dumps(content)
    # What somebody edited on purpose can be of any form.
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
        raise NotPlainError(
            f"it has another form ({type(error).__name__}: {error!s:.200})"
        ) from error
    _check(same, "it holds more than a graph, or in another form")
    return stored


class _Reader:
    """Rebuilds a graph from the content of a file."""

    def __init__(self, content: Mapping[str, Any], allow: Collection[str] | None) -> None:
        self.registered = registered_in(None if allow is None else {*LIBRARIES, *allow})
        self.graph = fx.Graph()
        self.nodes: dict[str, fx.Node] = {}
        self.bits: dict[fx.Node, int] = {}
        self.tensors: dict[str, StoredTensor] = {}
        for name, told in content["tensors"].items():
            self.tensors[name] = self.tensor(name, told)
        modules: set[str] = set()
        for name in self.tensors:
            modules |= {name[: dot.start()] for dot in re.finditer(r"\.", name)}
            _check(len(modules) <= _NODES, f"it has more than {_NODES:,} modules")
        _check(not modules & self.tensors.keys(), "a name is that of a tensor and of a module")
        _check(len(content["nodes"]) <= _NODES, f"it has more than {_NODES:,} nodes")
        for told in content["nodes"]:
            self.node(**told)
        self.set_signature(content, allow)
        self.stored = StoredGraph(self.graph, self.tensors, content["constants"])

    def tensor(self, name: str, told: Mapping[str, Any]) -> StoredTensor:
        if not _is_tensor_name(name):
            raise NotPlainError(
                f"{name!r:.99} is no name that can be written: its parts are letters, digits, _ "
                f"and -, none is a keyword of Python, and it has {_NAME} characters at most",
                saving="rename the module or parameter in the members' class",
            )
        made = StoredTensor(**{**told, "shape": tuple(told["shape"])})
        dtype = from_data({"dtype": made.dtype}, {})
        trains = dtype.is_floating_point or dtype.is_complex
        _check(made.kind in (_PARAMETER, _BUFFER, _CONSTANT), f"{name} is of no kind")
        good = made.requires_grad is False or (trains and made.requires_grad is True)
        _check(good, f"{name} cannot be trained")
        first = self.tensors.get(made.tied_to) if made.tied_to else made
        _check(first == replace(made, tied_to=""), f"{name} is tied to no tensor like it")
        return made

    def node(
        self, op: str, name: str = "", target: str = "", args: Any = (), kwargs: Any = None
    ) -> None:
        given = tuple(from_data(args, self.nodes)) if args else ()
        named = {key: from_data(value, self.nodes) for key, value in (kwargs or {}).items()}
        if op == "output":
            (value,) = given
            self.graph.output(value)
            return
        for own in (name, *named):
            _check(_is_identifier(own), f"{own!r:.99} cannot name a node or argument")
        if op == "call":
            function = self.operator(target)
            _check(is_call(function, given, named), f"{name} calls {target} in another way")
            made = self.graph.call_function(function, given, named, name=name)
            beyond = excess(made, self.bits)
            _check(not beyond, f"{name}, a call of {target}, {beyond}")
        elif op == "tensor":
            _check(target in self.tensors or target == _TRAINING, f"{name} reads no tensor")
            made = self.graph.create_node("get_attr", target, name=name)
        else:
            _check(_is_identifier(target), f"{target!r:.99} cannot name an input")
            made = self.graph.create_node("placeholder", target, name=name)
        # torch.fx renames what is no name for it.
        _check(made.name == name, f"{name!r} cannot name a node")
        self.nodes[name] = made

    def operator(self, name: str) -> Any:
        found = find_operator(name, self.registered)
        if found is None:
            library = name.partition(".")[0]
            own = "where you trust it, import the library that registers the operator, and pass "
            own += f'allow=("{library:.99}",) to fxfuse.load'
            raise NotPlainError(
                f"it calls {name!r:.99}, which is not among the operators that are allowed",
                loading="" if library in LIBRARIES else own,
            )
        return found

    def set_signature(self, content: Mapping[str, Any], allow: Collection[str] | None) -> None:
        """Set names and structure of inputs and outputs, which torch.fx writes into code."""
        arguments = content["arguments"]
        takes, returns = (from_structure(content[key], allow) for key in ("inputs", "outputs"))
        positional, named = takes.children()
        _check([takes.type, positional.type, named.type] == [tuple, tuple, dict], "no call")
        for name in (*arguments, *named.context):
            if not _is_identifier(name) or name == "self":
                raise NotPlainError(f"{name!r:.99} cannot name an input", saving="rename the input")
        *steps, last = self.graph.nodes
        ops = [node.op for node in steps]
        _check(last.op == "output" and "output" not in ops, "the output is not the last node")
        given: Any = last.args[0]
        counts = len(arguments), ops.count("placeholder"), len(given)
        stated = positional.num_children + named.num_children, takes.num_leaves, returns.num_leaves
        good = counts == stated and len(set(arguments)) == len(arguments)
        _check(good, "the graph takes or returns something else than it says")
        set_signature(self.graph, arguments, takes, returns)


def _check(good: bool, why: str) -> None:
    if not good:
        raise NotPlainError(why)


def _is_identifier(name: str) -> bool:
    good = len(name) <= _NAME and _IDENTIFIER.fullmatch(name) is not None
    return good and not keyword.iskeyword(name) and name != "__debug__"


def _is_tensor_name(name: str) -> bool:
    """Tell whether a tensor can be registered under a name, and hides nothing of a module."""
    first, *rest = name.split(".")
    plain = all(_PART.fullmatch(p) and not keyword.iskeyword(p) for p in (first, *rest))
    free = first not in _TAKEN and not any(hasattr(_MODULE, part) for part in rest)
    return plain and free and len(name) <= _NAME


_MODULE = nn.Module()
#: Attributes of a graph module; the last two are those of one with nested inputs.
_TAKEN = frozenset((*dir(fx.GraphModule({}, fx.Graph())), "_in_spec", "_out_spec"))
