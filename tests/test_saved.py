"""Saved networks come back as they were; nothing that a file says is imported, run or unpickled.

The attacks leave a file behind where they get through.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import pickle
import shutil
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import fxfuse
from fxfuse import Example, Heads
from fxfuse.api.saved import CONSTANTS, EXPORTED, GRAPH, PLAN, WEIGHTS
from fxfuse.errors import (
    CheckpointError,
    OptionError,
    OutputError,
    RewriteError,
)
from fxfuse.graph import graph_file
from fxfuse.members.checkpoint import read_state_dict, write_state_dict
from fxfuse.runtime import inference_copy
from tests import own
from tests.forked import Child
from tests.nets import images, mean_of, resnets


class Tied(nn.Module):
    """An output layer that is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.inner = nn.Linear(8, 8)
        self.out = nn.Linear(8, 11, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(self.inner(self.embedding(ids)).relu())


@pytest.fixture(scope="module")
def result() -> fxfuse.FusionResult:
    return fxfuse.fuse(resnets(2), images(), size=1.5)


@pytest.fixture(scope="module")
def saved(result: fxfuse.FusionResult, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "fused"
    fxfuse.save(result, folder)
    return folder


@pytest.mark.parametrize("training", [False, True])
def test_a_network_comes_back_as_it_was(
    result: fxfuse.FusionResult, saved: Path, training: bool
) -> None:
    assert sorted(p.name for p in saved.iterdir()) == sorted((WEIGHTS, GRAPH, PLAN))
    # In training a network counts its batches, and others use this one.
    found, own = fxfuse.load(saved), copy.deepcopy(result.module)
    assert not found.training
    assert list(found.state_dict()) == list(own.state_dict())
    x = images(7)
    answers = []
    for network in (own, found):
        network.train(training)
        torch.manual_seed(0)
        answers.append(network(x))
        network.eval()
    assert torch.equal(*answers)
    assert not torch.equal(answers[0][0], answers[0][1])
    for name, value in own.state_dict().items():
        assert torch.equal(value, found.state_dict()[name]), name


def test_a_loaded_network_trains_compiles_and_is_saved_again(saved: Path, tmp_path: Path) -> None:
    network = fxfuse.load(saved).train()
    network(images()).square().mean().backward()
    assert all(p.grad is not None for p in network.parameters())
    torch.optim.SGD(network.parameters(), lr=0.1).step()
    network.eval()
    fxfuse.save(network, tmp_path / "again")
    again = fxfuse.load(tmp_path / "again")
    x = images()
    assert torch.equal(again(x), network(x))
    assert torch.equal(torch.compile(again, backend="eager", fullgraph=True)(x), network(x))
    assert not (tmp_path / "again" / PLAN).exists()


def test_an_export_for_other_programs_is_never_read(
    result: fxfuse.FusionResult, tmp_path: Path
) -> None:
    x = images(3)
    fxfuse.save(result, tmp_path / "both", export=True)
    program = torch.export.load(tmp_path / "both" / EXPORTED)
    assert torch.equal(program.module()(x), result.module(x))
    described = zipfile.ZipFile(tmp_path / "both" / EXPORTED).read("archive/models/model.json")
    assert b"tests/nets.py" not in described, "names of files are no one's business"
    (tmp_path / "both" / EXPORTED).write_bytes(pickle.dumps(Opened(tmp_path / "opened")))
    assert torch.equal(fxfuse.load(tmp_path / "both")(x), result.module(x))
    assert not (tmp_path / "opened").exists()


def test_the_same_network_gives_the_same_bytes(
    result: fxfuse.FusionResult, saved: Path, tmp_path: Path
) -> None:
    fxfuse.save(result, tmp_path / "twice")
    for name in (WEIGHTS, GRAPH, PLAN):
        assert (saved / name).read_bytes() == (tmp_path / "twice" / name).read_bytes(), name


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    torch.manual_seed(0)
    ids = torch.randint(11, (3, 5))
    fused = fxfuse.fuse([Tied(), Tied()], ids).module
    fxfuse.save(fused, tmp_path / "tied")
    found = fxfuse.load(tmp_path / "tied")
    assert torch.equal(found(ids), fused(ids))
    assert len(list(found.parameters())) == len(list(fused.parameters())) == 3


def test_a_stack_is_saved_too(tmp_path: Path) -> None:
    members, x = resnets(2), images()
    fxfuse.save(fxfuse.stack(members, x, reduce="mean"), tmp_path / "stack")
    found = fxfuse.load(tmp_path / "stack")
    torch.testing.assert_close(found(x), mean_of(members, x))


def test_weights_of_another_run_are_taken_from_their_file(
    result: fxfuse.FusionResult, saved: Path, tmp_path: Path
) -> None:
    shutil.copytree(saved, tmp_path / "other")
    state = {name: value * 2 for name, value in result.state_dict().items()}
    write_state_dict(tmp_path / "other" / WEIGHTS, state)
    assert torch.equal(fxfuse.load(tmp_path / "other").state_dict()["fc.bias"], state["fc.bias"])
    state["fc.bias"] = state["fc.bias"][:-1]
    write_state_dict(tmp_path / "other" / WEIGHTS, state)
    with pytest.raises(CheckpointError, match=r"fc\.bias"):
        fxfuse.load(tmp_path / "other")
    doubles = {name: value.double() for name, value in result.state_dict().items()}
    write_state_dict(tmp_path / "other" / WEIGHTS, doubles)
    with pytest.raises(CheckpointError, match="float64"):
        fxfuse.load(tmp_path / "other")


def test_what_is_not_there_or_not_ours(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        fxfuse.load(tmp_path / "nobody")
    with pytest.raises(CheckpointError, match=WEIGHTS):
        fxfuse.load(tmp_path)
    shutil.copytree(saved, tmp_path / "weights")
    (tmp_path / "weights" / GRAPH).unlink()
    with pytest.raises(CheckpointError, match="holds weights, but no graph"):
        fxfuse.load(tmp_path / "weights")
    with pytest.raises(OutputError, match="fused exists already"):
        fxfuse.save(fxfuse.load(saved), saved, images())
    plain = inference_copy(fxfuse.load(saved))
    with pytest.raises(OptionError, match="example inputs are missing"):
        fxfuse.save(plain, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    fxfuse.save(plain, tmp_path / "new", images())
    x = images(3)
    assert torch.equal(fxfuse.load(tmp_path / "new")(x), plain(x))


class Everything(nn.Module):
    """Constants, complex weights, recurrent layers, keyword inputs, nested outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(4, 6, num_layers=2, bidirectional=True, batch_first=True, dropout=0.1)
        self.gru = nn.GRU(12, 5, batch_first=True)
        self.turn = nn.Parameter(torch.randn(5, 3, dtype=torch.complex64))
        self.branches = nn.ModuleDict({"3x3": nn.Linear(5, 3), "1-1": nn.Linear(5, 3)})
        self.branches.requires_grad_(False)
        self.register_buffer("window", torch.hann_window(4), persistent=False)
        self.register_buffer("kept", torch.ones(3))

    def forward(self, x: torch.Tensor, *, scale: torch.Tensor) -> dict[str, Any]:
        states, _ = self.gru(self.rnn(x * self.window)[0])
        last = states[:, -1].clamp(-float("inf"), 1e3)
        turned = (torch.complex(last, last) @ (self.turn * 1j)).abs()
        mask = torch.full((x.shape[0], 1), -float("inf"), dtype=x.dtype).exp()
        first = self.branches["3x3"](last) * scale + mask
        return {"sum": first + self.kept, "parts": [turned, (self.branches["1-1"](last),)]}


@pytest.mark.parametrize("kind", ["fuse", "prune", "wider", "stack"])
def test_everything_that_a_graph_can_hold_comes_back(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    members, x, scale = [Everything(), Everything()], torch.randn(3, 7, 4), torch.tensor(2.0)
    if kind == "prune":
        made: Any = fxfuse.prune(members[0], Example(x, kwargs={"scale": scale}), size=0.5)
    elif kind == "stack":
        made = fxfuse.stack(members, Example(x, kwargs={"scale": scale}), verify=False)
    else:
        made = fxfuse.fuse(
            members, Example(x, kwargs={"scale": scale}), size=1.5 if kind == "wider" else 1.0
        )
    fxfuse.save(made, tmp_path / "saved")
    assert (tmp_path / "saved" / CONSTANTS).exists()
    network, found = getattr(made, "module", made), fxfuse.load(tmp_path / "saved")
    assert found.code == network.code
    for name, tensor in network.named_parameters(remove_duplicate=False):
        assert found.get_parameter(name).requires_grad == tensor.requires_grad
    assert list(found.state_dict()) == list(network.state_dict())
    assert {n for n, _ in found.named_buffers()} == {n for n, _ in network.named_buffers()}
    answers = found(x, scale=scale), network(x, scale=scale)
    torch.testing.assert_close(*answers, rtol=0, atol=0)
    again = pickle.loads(pickle.dumps(found))
    torch.testing.assert_close(again(x, scale=scale), answers[0], rtol=0, atol=0)
    fxfuse.save(found, tmp_path / "again")
    for name in (WEIGHTS, CONSTANTS, GRAPH):
        one, two = ((tmp_path / folder / name).read_bytes() for folder in ("saved", "again"))
        assert one == two, name


def test_other_precisions_and_heads_come_back(tmp_path: Path) -> None:
    heads = fxfuse.fuse(resnets(2), images(), heads=Heads(output="concat")).module
    half = fxfuse.fuse(resnets(2), images()).module.to(torch.bfloat16)
    for network, x in ((heads, images()), (half, images().bfloat16())):
        fxfuse.save(network, tmp_path / "saved", force=True)
        torch.testing.assert_close(fxfuse.load(tmp_path / "saved")(x), network(x), rtol=0, atol=0)


def test_a_loaded_network_is_compiled_as_before(result: fxfuse.FusionResult, saved: Path) -> None:
    x = images()
    settings: dict[str, Any] = {"backend": "eager", "channels_last": True}
    one = fxfuse.compile(result, **settings)
    two = fxfuse.compile(fxfuse.load(saved), x, **settings)
    assert one.report.passes == two.report.passes
    assert one.graph_module.code == two.graph_module.code


class Scaled(nn.Module):
    """An operator of the user's own, and a class of the user's own around the outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5))
        self.out = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> Any:
        return Answer(self.out(own.smooth(self.inner(x))), x)


@dataclass
class Answer:
    """Two outputs."""

    logits: torch.Tensor
    inputs: torch.Tensor


torch.export.register_dataclass(Answer, serialized_type_name="fxfuse_tests.Answer")


def test_what_is_the_users_own_is_allowed_by_name(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4)
    fused = fxfuse.fuse([Scaled(), Scaled()], x).module
    fxfuse.save(fused, tmp_path / "own")
    for allow in ((), ("fxfuse",)):
        with pytest.raises(CheckpointError, match=r'allow=\("fxfuse_tests",\)'):
            fxfuse.load(tmp_path / "own", allow=allow)
    found = fxfuse.load(tmp_path / "own", allow=("fxfuse_tests",))(x)
    assert isinstance(found, Answer)
    assert torch.equal(found.logits, fused(x).logits)

    def rename(graph: Any) -> None:
        for node in graph["nodes"]:
            if node.get("target") == "fxfuse_tests.smooth.default":
                node["target"] = "fxfuse_tests.nobody.default"

    with pytest.raises(CheckpointError, match=r"fxfuse_tests\.nobody"):
        fxfuse.load(edited(tmp_path / "own", tmp_path / "other", rename), allow=("fxfuse_tests",))


@dataclass
class Scores:
    """A dataclass of which torch was never told."""

    scores: torch.Tensor


class Pair(NamedTuple):
    """Outputs by name, of which one is an object."""

    inputs: torch.Tensor
    found: Scores


class Paired(Scaled):
    def forward(self, x: torch.Tensor) -> Pair:
        return Pair(x, Scores(self.out(self.inner(x))))


def test_dataclasses_and_named_tuples_are_found_where_they_were_imported(tmp_path: Path) -> None:
    x = torch.randn(2, 4)
    fused = fxfuse.fuse([Paired(), Paired()], x).module
    fxfuse.save(fused, tmp_path / "own")
    for allow in ((), ("torch",)):
        with pytest.raises(CheckpointError, match=r'allow=\("tests",\)'):
            fxfuse.load(tmp_path / "own", allow=allow)
    found = fxfuse.load(tmp_path / "own", allow=("tests",))(x)
    assert type(found) is Pair
    assert type(found.found) is Scores
    assert torch.equal(found.found.scores, fused(x).found.scores)
    # In a process in which no such network has been captured; nothing is imported for the file.
    code = (
        "import sys, torch, fxfuse\n"
        "load = lambda: fxfuse.load(folder, allow=('tests',))\n"
        "try: load()\n"
        "except fxfuse.FxfuseError: assert 'tests.test_saved' not in sys.modules\n"
        "import tests.test_saved\n"
        "print(type(load()(torch.randn(2, 4)).found).__name__)"
    )
    status, out, err = Child(exec, code, {"folder": tmp_path / "own"}).ended()
    assert (status, out) == (0, "Scores\n"), err

    class Local(NamedTuple):
        scores: torch.Tensor

    class Hidden(Scaled):
        def forward(self, x: torch.Tensor) -> Local:
            return Local(self.out(self.inner(x)))

    with pytest.raises(RewriteError, match="outside of functions"):
        fxfuse.save(fxfuse.fuse([Hidden(), Hidden()], x), tmp_path / "local")


class Named(nn.Module):
    """Any name for a layer."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({name: nn.Linear(3, 5), "out": nn.Linear(5, 3)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers.values():
            x = layer(x)
        return x


@pytest.mark.parametrize("name", ["a b", "é", "a" * 200])
def test_a_name_that_cannot_be_written_is_rejected_when_saving(name: str, tmp_path: Path) -> None:
    fused = fxfuse.fuse([Named(name), Named(name)], torch.randn(2, 3))
    with pytest.raises(RewriteError, match="rename the module or parameter") as found:
        fxfuse.save(fused, tmp_path / "named")
    assert name[:50] in str(found.value)
    assert not (tmp_path / "named").exists()


def test_an_earlier_format_is_rejected_and_converted(
    result: fxfuse.FusionResult, tmp_path: Path
) -> None:
    x = images()
    fxfuse.save(result, tmp_path / "old", export=True)
    (tmp_path / "old" / GRAPH).unlink()
    with pytest.raises(CheckpointError, match=r"fxfuse\.save\(torch\.export\.load\(") as found:
        fxfuse.load(tmp_path / "old")
    assert "earlier format" in str(found.value)
    fxfuse.save(torch.export.load(tmp_path / "old" / EXPORTED), tmp_path / "new")
    network = fxfuse.load(tmp_path / "new")
    assert torch.equal(network(x), result.module(x))
    assert network.train()(x).requires_grad


@dataclass
class Opened:
    """Leaves a file behind when it is unpickled."""

    log: Path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.log,)


def edited(saved: Path, target: Path, change: Callable[[Any], object], name: str = GRAPH) -> Path:
    """A copy of a folder with an edited graph, and the checksum that belongs to it."""
    shutil.copytree(saved, target)
    graph = json.loads((saved / name).read_text())
    del graph["sha256"]
    graph = change(graph) or graph
    graph["sha256"] = hashlib.sha256(json.dumps(graph).encode()).hexdigest()
    (target / name).write_text(json.dumps(graph))
    return target


def change_node(op: str, /, **entries: Any) -> Callable[[Any], object]:
    """Changes the first node of a kind."""

    def change(graph: Any) -> None:
        node = next(node for node in graph["nodes"] if node["op"] == op)
        for key, value in entries.items():
            node[key] = value

    return change


def add_calls(*calls: tuple[Any, ...]) -> Callable[[Any], object]:
    """Adds calls after the inputs, the first on the batch size, each on the one before."""

    def change(graph: Any) -> None:
        place = next(i for i, node in enumerate(graph["nodes"]) if node["op"] == "call")
        steps = (("aten.sym_size.int", [ANY, 0]), *calls)
        for number, (target, args, *kwargs) in enumerate(steps):
            named = {"kwargs": kwargs[0]} if kwargs else {}
            args = [{"node": f"step_{number - 1}"} if arg is LAST else arg for arg in args]
            call = {"name": f"step_{number}", "op": "call", "target": target, "args": args}
            graph["nodes"].insert(place + number, call | named)

    return change


def rename_tensor(name: str) -> Callable[[Any], object]:
    """Gives a tensor of the graph, and the node that reads it, another name."""

    def change(graph: Any) -> None:
        graph["tensors"] = {name if k == "fc.bias" else k: v for k, v in graph["tensors"].items()}
        for node in graph["nodes"]:
            if node.get("target") == "fc.bias":
                node["target"] = name

    return change


def rename_input(name: str) -> Callable[[Any], object]:
    """Gives the input another name, everywhere."""

    def change(graph: Any) -> Any:
        text = json.dumps(graph)
        for old, new in (('["x"]', [name]), ('{"node": "x"}', {"node": name})):
            text = text.replace(old, json.dumps(new))
        for key in ("name", "target"):
            text = text.replace(f'"{key}": "x"', f'"{key}": {json.dumps(name)}')
        return json.loads(text)

    return change


def call_of(keys: list[str]) -> Any:
    """The structure of a call with keyword inputs."""
    named = ["builtins.dict", keys, ["*" for _ in keys]]
    return ["builtins.tuple", None, [["builtins.tuple", None, []], named]]


def nested(levels: int) -> Any:
    value: Any = []
    for _ in range(levels):
        value = [value]
    return value


#: Without dots and quotes that are in the way of it.
MARK = r"exec('__import__(\'pathlib\')\x2ePath(\'opened\')\x2etouch()')"
HIDDEN = f'fc"+str({MARK})+"'
ANY, LAST = {"node": "x"}, {"node": ""}
ATTACKS: dict[str, Callable[[Any], object]] = {
    "a default of an input": rename_input(f"x={MARK}"),
    "a keyword": rename_input("lambda"),
    "no assignable name": rename_input("__debug__"),
    "self": rename_input("self"),
    "an input of builtins": rename_input("print"),
    "the name of an argument": lambda g: g.update(arguments=[f"x={MARK}"]),
    "a keyword input": lambda g: g.update(inputs=call_of([f"x': {MARK}, 'x"])),
    "keyword inputs that lack": lambda g: g.update(inputs=call_of(["x", "y"])),
    "two inputs of one name": lambda g: g.update(arguments=["x", "x"]),
    "a parameter": rename_tensor(HIDDEN),
    "a parameter with a newline": rename_tensor(f"fc.bias\n    {MARK}"),
    "a parameter that is a keyword": rename_tensor("fc.lambda"),
    "a parameter that is a method": rename_tensor("forward"),
    "a parameter of a method": rename_tensor("forward.__globals__"),
    "a parameter of a structure": rename_tensor("_in_spec"),
    "a parameter within a tensor": rename_tensor("fc.weight.bias"),
    "no name": rename_tensor(""),
    "a long name": rename_tensor("a" * 201),
    "a node": change_node("call", name=f"y={MARK}"),
    "a node of another's name": change_node("call", name="x"),
    "an argument": change_node("call", kwargs={f"a={MARK}, b": 1}),
    "an attribute": change_node("tensor", target="__class__"),
    "a module": change_node("tensor", target="fc"),
    "a function of torch": change_node("call", target="torch.os.system", args=[MARK]),
    "a builtin": change_node("call", target="builtins.eval", args=[MARK]),
    "a builtin alone": change_node("call", target="eval", args=[MARK]),
    "any attribute": change_node("call", target="getattr", args=[ANY, "__class__"]),
    "an attribute of two": change_node("call", target="getattr", args=[ANY, "device", 1]),
    "a maker of getters": change_node("call", target="operator.attrgetter", args=["x"]),
    "a loader": change_node("call", target="torch.load", args=["opened"]),
    "a library": change_node("call", target="torch.ops.load_library", args=["opened"]),
    "an operator that opens files": change_node("call", target="aten.from_file.default"),
    "one that writes files": change_node("call", target="aten.save.default", args=[1, "opened"]),
    "one of torchvision that reads them": change_node(
        "call", target="image.read_file.default", args=["/etc/passwd"]
    ),
    "one of torchvision that writes them": change_node(
        "call", target="image.write_file.default", args=["opened", ANY]
    ),
    "one that prints": change_node("call", target="aten._print.default", args=["opened"]),
    "one that trusts indices": change_node("call", target="aten._sparse_coo_tensor_unsafe.default"),
    "an operator of a user": change_node("call", target="fxfuse_tests.smooth.default", args=[ANY]),
    "an operator without overload": change_node("call", target="aten.relu"),
    "no overload": change_node("call", target="aten.relu.__init__"),
    "no packet": change_node("call", target="aten.__class__.default"),
    "a region": change_node("call", target="higher_order.wrap.default"),
    "a number for numbers": change_node("call", target="operator.pow", args=[9, 9**9]),
    "too few numbers": change_node("call", target="operator.pow", args=[ANY]),
    "too many numbers": change_node("call", target="operator.neg", args=[ANY, 1, 2]),
    "an endless power": change_node("call", target="operator.pow", args=[ANY, 64**6]),
    "an endless shift": change_node("call", target="operator.lshift", args=[ANY, 64**6]),
    "a chain of powers": add_calls(*[("operator.pow", [LAST, 64])] * 3),
    "a chain of products": add_calls(*[("operator.mul", [LAST, LAST])] * 8),
    "a chain of shifts": add_calls(*[("operator.lshift", [LAST, 64])] * 70),
    "a power of two sizes": add_calls(("operator.pow", [LAST, LAST])),
    "a power of a number": add_calls(("operator.pow", [9, LAST])),
    "a shift by a size": add_calls(("operator.lshift", [1, LAST])),
    "a list many times": add_calls(
        ("aten.split.Tensor", [ANY, 1]), ("operator.mul", [LAST, 10**9])
    ),
    "a list of tensors and itself": add_calls(
        ("aten.split.Tensor", [ANY, 1]), ("operator.add", [LAST, LAST])
    ),
    "many repetitions": add_calls(("aten.repeat.default", [ANY, [10**9, 3, 1, 1]])),
    "a long range": add_calls(("aten.arange.default", [10**12])),
    "a large tensor of zeros": add_calls(("aten.zeros.default", [[2**20, 2**20]])),
    "a large tensor by keyword": add_calls(("aten.full.default", [[1], 0], {"size": [2**40]})),
    "a text for numbers": change_node("call", target="operator.mul", args=[ANY, "x"]),
    "a count of nothing": change_node("call", target="fxfuse.count_batch", args=[1, 2]),
    "another op": change_node("call", op="call_method"),
    "a node to come": change_node("call", args=[{"node": "linear"}]),
    "a node itself": change_node("call", args=[{"node": "conv2d"}]),
    "no kind": change_node("call", args=[{"object": "x"}]),
    "two kinds": change_node("call", args=[{"node": "x", "dtype": "float32"}]),
    "a dtype": change_node("call", args=[{"dtype": "os"}]),
    "a device": change_node("call", args=[{"device": MARK}]),
    "a number as text": change_node("call", args=[{"float": "1.5"}]),
    "a large integer": change_node("call", args=[2**70]),
    "a large number": change_node("call", args=[1e300 * 1e300]),
    "deep lists": change_node("call", args=nested(30)),
    "lists without end": change_node("call", args=nested(400)),
    "a long list": change_node("call", args=[[0] * 400_000]),
    "a long text": change_node("call", args=["a" * 20_000]),
    "something more": change_node("call", more=1),
    "something more of a tensor": lambda g: g["tensors"]["fc.bias"].update(more=1),
    "something more at all": lambda g: g.update(more=1),
    "an order of its own": lambda g: dict(reversed(g.items())),
    "no nodes": lambda g: g.update(nodes=[]),
    "no output": lambda g: g["nodes"].pop(),
    "a target": change_node("input", target=f"x={MARK}"),
    "an annotation": lambda g: g["nodes"][-1]["args"].append(MARK),
    "a default": change_node("input", args=[1]),
    "many modules": lambda g: g["tensors"].update(
        {f"{i}{'.a' * 90}": g["tensors"]["fc.bias"] for i in range(500)}
    ),
    "two outputs": lambda g: g["nodes"].append(g["nodes"][-1]),
    "outputs that lack": lambda g: g.update(outputs=["builtins.list", None, ["*", "*"]]),
    "many nodes": lambda g: g.update(nodes=g["nodes"][:1] * 50_000),
    "a class": lambda g: g.update(outputs=["torch.Size", None, ["*"]]),
    "a class of a user": lambda g: g.update(outputs=["fxfuse_tests.Answer", [], ["*"]]),
    "a class to import": lambda g: g.update(outputs=["os.system", None, ["*"]]),
    "a named tuple": lambda g: g.update(outputs=["collections.namedtuple", "os", ["*"]]),
    "a default factory": lambda g: g.update(outputs=["collections.defaultdict", ["os"], ["*"]]),
    "no outputs": lambda g: g.update(outputs=None),
    "a tensor of no kind": lambda g: g["tensors"]["fc.bias"].update(kind="module"),
    "a tensor of no dtype": lambda g: g["tensors"]["fc.bias"].update(dtype="os"),
    "a flag that is a number": lambda g: g["tensors"]["fc.bias"].update(requires_grad=1),
    "counts that are trained": lambda g: g["tensors"]["bn.num_batches_tracked"].update(
        requires_grad=True
    ),
    "tied to nothing": lambda g: g["tensors"].update({"fc.bias": {"tied_to": "nobody"}}),
    "tied to itself": lambda g: g["tensors"].update({"fc.bias": {"tied_to": "fc.bias"}}),
    "a large tensor": lambda g: g["tensors"]["fc.bias"].update(shape=[10**15]),
    "a negative size": lambda g: g["tensors"]["fc.bias"].update(shape=[-1]),
    "constants": lambda g: g["tensors"]["fc.bias"].update(kind="constant"),
    "another version": lambda g: g.update(fxfuse_graph=2),
    "no version": lambda g: g.update(fxfuse_graph=None),
    "a list": lambda g: {"fxfuse_graph": 1, "nodes": []},
}


def test_operators_of_other_libraries_would_reach_files() -> None:
    """Those of torchvision are there, so the attacks below do not fail for want of them."""
    pytest.importorskip("torchvision")
    assert b"root" in bytes(torch.ops.image.read_file("/etc/passwd").tolist())


@pytest.mark.parametrize("name", ATTACKS)
def test_a_graph_that_is_not_what_fxfuse_writes_is_rejected(
    saved: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = edited(saved, tmp_path / "edited", ATTACKS[name])
    monkeypatch.chdir(tmp_path)
    start = time.monotonic()
    # A graph that is sound by itself may not fit the weights beside it.
    known = "is not a graph that fxfuse wrote|does not fit the model"
    with pytest.raises(CheckpointError, match=known) as found:
        fxfuse.load(folder)
    assert time.monotonic() - start < 10
    assert found.value.why
    assert found.value.how
    assert not (tmp_path / "opened").exists()


def test_sizes_are_computed_within_bounds(saved: Path, tmp_path: Path) -> None:
    """Else the attacks above would fail for another reason."""
    sound = add_calls(
        *[("operator.mul", [LAST, LAST])] * 5,
        ("operator.pow", [LAST, -1]),
        ("aten.arange.default", [1000]),
        ("aten.slice.Tensor", [LAST, 0, 0, 2**63 - 1]),
        ("aten.repeat.default", [ANY, [100, 1, 1, 1]]),
    )
    x = images()
    found = fxfuse.load(edited(saved, tmp_path / "sound", sound))
    assert torch.equal(found(x), fxfuse.load(saved)(x))
    for name, why in (("a chain of powers", "bits"), ("many repetitions", "elements")):
        with pytest.raises(CheckpointError, match=f"more than [0-9,]+ {why}"):
            fxfuse.load(edited(saved, tmp_path / why, ATTACKS[name]))


@pytest.mark.parametrize("name", ["a keyword input", "a parameter", "an argument"])
def test_the_attacks_would_work_without_the_check(
    saved: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.fx writes names into code as they are, so the check is what stands between."""
    for check in ("_check", "_is_identifier", "_is_tensor_name"):
        monkeypatch.setattr(graph_file, check, lambda *_: True)
    folder = edited(saved, tmp_path / "edited", ATTACKS[name])
    monkeypatch.chdir(tmp_path)
    with contextlib.suppress(Exception):
        state = read_state_dict(folder / WEIGHTS)
        if name == "a parameter":
            state[HIDDEN] = state.pop("fc.bias")
        write_state_dict(folder / WEIGHTS, state)
        fxfuse.load(folder)(x=images())
    assert (tmp_path / "opened").exists()


@pytest.mark.parametrize(
    "kind", ["pickle", "archive", "text", "empty", "deep", "twice", "large", "digits"]
)
def test_what_is_no_graph_at_all(saved: Path, tmp_path: Path, kind: str) -> None:
    shutil.copytree(saved, tmp_path / "other")
    path = tmp_path / "other" / GRAPH
    if kind == "archive":
        torch.save({"opaque_obj_0": Opened(tmp_path / "opened")}, path)
    else:
        contents = {
            "pickle": pickle.dumps(Opened(tmp_path / "opened")),
            "text": b"import os",
            "empty": b"",
            "deep": b"[" * 200_000,
            "twice": b'{"fxfuse_graph": 1, "fxfuse_graph": 1}',
            "large": b" " * (17 << 20),
            "digits": b'{"fxfuse_graph": ' + b"9" * 10**6 + b"}",
        }
        path.write_bytes(contents[kind])
    with pytest.raises(CheckpointError, match="not a graph that fxfuse wrote"):
        fxfuse.load(tmp_path / "other")
    assert not (tmp_path / "opened").exists()


@pytest.mark.parametrize("name", [GRAPH, WEIGHTS, CONSTANTS])
def test_what_has_no_end_is_not_read(name: str, saved: Path, tmp_path: Path) -> None:
    def needs_constants(graph: Any) -> None:
        graph["tensors"]["fc.bias"].update(kind="constant")
        graph["tensors"]["fc.bias"] = graph["tensors"].pop("fc.bias")

    folder = edited(saved, tmp_path / "edited", needs_constants)
    state = read_state_dict(saved / WEIGHTS)
    del state["fc.bias"]
    write_state_dict(folder / WEIGHTS, state)
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(CheckpointError, match=r"no regular file|holds no fused|but no graph"):
        fxfuse.load(folder)


@pytest.mark.parametrize("name", [GRAPH, CONSTANTS])
def test_a_damaged_byte_is_noticed(name: str, tmp_path: Path) -> None:
    """Of the weights it is not: others may take their place."""
    torch.manual_seed(0)
    x, scale = torch.randn(2, 7, 4), torch.tensor(1.0)
    fused = fxfuse.fuse([Everything(), Everything()], Example(x, kwargs={"scale": scale}))
    fxfuse.save(fused, tmp_path / "saved")
    path = tmp_path / "saved" / name
    content = bytearray(path.read_bytes())
    content[content.index(b"1000.0") + 1 if name == GRAPH else -5] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"checksum|belongs to this graph"):
        fxfuse.load(tmp_path / "saved")
    path.unlink()
    with pytest.raises(CheckpointError, match=r"holds weights, but no graph|cannot open"):
        fxfuse.load(tmp_path / "saved")


def test_a_network_is_never_pickled(saved: Path) -> None:
    for path in saved.iterdir():
        with pytest.raises(pickle.UnpicklingError):
            pickle.loads(path.read_bytes())
