"""Saved networks come back as they were; nothing that a file says is imported, run or unpickled."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxfuse
from fxfuse.api.archive import read_graph
from fxfuse.api.saved import FILES, GRAPH, PLAN, WEIGHTS
from fxfuse.errors import (
    CheckpointError,
    NoGraphError,
    OptionError,
    OutputError,
)
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
    assert sorted(p.name for p in saved.iterdir()) == sorted(FILES)
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
    fxfuse.save(network, tmp_path / "again", images())
    again = fxfuse.load(tmp_path / "again")
    x = images()
    assert torch.equal(again(x), network(x))
    assert torch.equal(torch.compile(again, backend="eager", fullgraph=True)(x), network(x))
    assert not (tmp_path / "again" / PLAN).exists()


def test_the_graph_alone_is_a_program_of_torch_export(
    result: fxfuse.FusionResult, saved: Path
) -> None:
    x = images(3)
    program = torch.export.load(saved / GRAPH)
    assert torch.equal(program.module()(x), result.module(x))
    described = zipfile.ZipFile(saved / GRAPH).read("archive/models/model.json").decode()
    assert "tests/nets.py" not in described, "names of files are no one's business"


def test_the_same_network_gives_the_same_bytes(
    result: fxfuse.FusionResult, saved: Path, tmp_path: Path
) -> None:
    fxfuse.save(result, tmp_path / "twice")
    for name in FILES:
        assert (saved / name).read_bytes() == (tmp_path / "twice" / name).read_bytes(), name


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    torch.manual_seed(0)
    ids = torch.randint(11, (3, 5))
    fused = fxfuse.fuse([Tied(), Tied()], ids).module
    fxfuse.save(fused, tmp_path / "tied", ids)
    found = fxfuse.load(tmp_path / "tied")
    assert torch.equal(found(ids), fused(ids))
    assert len(list(found.parameters())) == len(list(fused.parameters())) == 3


def test_a_stack_is_saved_too(tmp_path: Path) -> None:
    members, x = resnets(2), images()
    fxfuse.save(fxfuse.stack(members, x, reduce="mean"), tmp_path / "stack", x)
    found = fxfuse.load(tmp_path / "stack")
    torch.testing.assert_close(found(x), mean_of(members, x))


def test_weights_of_another_run_are_taken_from_their_file(
    result: fxfuse.FusionResult, saved: Path, tmp_path: Path
) -> None:
    from fxfuse.members.checkpoint import write_state_dict

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
    with pytest.raises(NoGraphError, match="no graph"):
        fxfuse.load(tmp_path / "weights")
    with pytest.raises(OutputError):
        fxfuse.save(fxfuse.load(saved), saved, images())
    with pytest.raises(OptionError, match="example inputs"):
        fxfuse.save(fxfuse.load(saved), tmp_path / "new")
    assert not (tmp_path / "new").exists()


class Opened:
    """Says so when it is unpickled."""

    log: Path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.log,)


def edited(saved: Path, target: Path, name: str, change: Callable[[bytes], bytes]) -> Path:
    """A copy of the graph with one entry changed, or added."""
    with zipfile.ZipFile(saved / GRAPH) as old, zipfile.ZipFile(target, "w") as new:
        entries = {i.filename: old.read(i) for i in old.infolist()}
        found = f"{next(iter(entries)).partition('/')[0]}/{name}"
        entries[found] = change(entries.get(found, b""))
        for key, value in entries.items():
            new.writestr(key, value)
    return target


def edit_json(change: Callable[[Any], None]) -> Callable[[bytes], bytes]:
    def run(content: bytes) -> bytes:
        value = json.loads(content)
        change(value)
        return json.dumps(value).encode()

    return run


def set_target(target: str) -> Callable[[bytes], bytes]:
    def change(model: Any) -> None:
        model["graph_module"]["graph"]["nodes"][0]["target"] = target

    return edit_json(change)


def set_symbol(text: str) -> Callable[[bytes], bytes]:
    """Puts a text where sympy evaluates a size."""

    def change(model: Any) -> None:
        value = next(iter(model["graph_module"]["graph"]["tensor_values"].values()))
        value["sizes"][0] = {"as_expr": {"expr_str": text, "hint": None}}

    return edit_json(change)


def pickled(content: bytes) -> bytes:
    buffer = io.BytesIO()
    torch.save(Opened(), buffer)
    return buffer.getvalue()


def pickled_weight(content: bytes) -> bytes:
    config = json.loads(content)
    next(iter(config["config"].values()))["use_pickle"] = True
    return json.dumps(config).encode()


MODEL, CONFIG = "models/model.json", "data/weights/model_weights_config.json"
ATTACKS: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "pickled inputs": ("data/sample_inputs/model.pt", pickled),
    "pickled weight": (CONFIG, pickled_weight),
    "a function of torch": (MODEL, set_target("torch.os.system")),
    "a loader": (MODEL, set_target("torch.load")),
    "an operator that opens files": (MODEL, set_target("torch.ops.aten.from_file.default")),
    "a function of operator": (MODEL, set_target("_operator.attrgetter")),
    "a region": (MODEL, set_target("torch.ops.higher_order.wrap")),
    "an import": (MODEL, set_symbol("__import__('os').system('touch opened')")),
    "an attribute": (MODEL, set_symbol("Symbol.__class__")),
    "a text": (MODEL, set_symbol("Symbol('__import__')")),
    "a comprehension": (MODEL, set_symbol("[s0 for s0 in ()]")),
    "a huge power": (MODEL, set_symbol("Pow(Integer(9), Pow(Integer(9), Integer(9)))")),
    "a large power": (MODEL, set_symbol("Pow(Integer(9), Integer(999999999))")),
    "a long text": (MODEL, set_symbol("1+" * 5000 + "1")),
    "deep parentheses": (MODEL, set_symbol("(" * 1500 + "1" + ")" * 1500)),
    "a custom class": (
        MODEL,
        edit_json(lambda m: m["graph_module"]["graph"].update(custom_obj_values={"a": {}})),
    ),
    "an enum": (
        MODEL,
        edit_json(lambda m: m["graph_module"].update(signature_note='[{"__enum__": true}]')),
    ),
    "notes": (
        MODEL,
        edit_json(lambda m: m["graph_module"]["graph"]["nodes"][0].update(metadata={"a": "b"})),
    ),
    "guards": (MODEL, edit_json(lambda m: m.update(guards_code=["opened()"]))),
    "a symbol": (MODEL, edit_json(lambda m: m["range_constraints"].update({"open('opened')": {}}))),
    "a library": ("data/aotinductor/model/model.so", lambda _: b"\x7fELF"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_a_graph_that_would_run_something_is_not_opened(
    saved: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Opened.log = tmp_path / "opened"
    monkeypatch.setattr(torch.export, "load", lambda _: pytest.fail("it was opened"))
    path = edited(saved, tmp_path / "graph.pt2", *ATTACKS[name])
    with pytest.raises(CheckpointError):
        read_graph(path)
    assert not (tmp_path / "opened").exists()


def test_the_attacks_would_work_without_the_check(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reader of torch itself unpickles, so the check is what stands between."""
    monkeypatch.setattr(logging, "raiseExceptions", False)
    Opened.log = tmp_path / "opened"
    path = edited(saved, tmp_path / "graph.pt2", *ATTACKS["pickled inputs"])
    # Only after it was unpickled does torch find out that these are no inputs.
    with contextlib.suppress(Exception):
        torch.export.load(path)
    assert (tmp_path / "opened").exists()


def test_a_compressed_graph_is_not_opened(saved: Path, tmp_path: Path) -> None:
    with (
        zipfile.ZipFile(saved / GRAPH) as old,
        zipfile.ZipFile(tmp_path / "graph.pt2", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    with pytest.raises(CheckpointError, match="compressed"):
        read_graph(tmp_path / "graph.pt2")


def test_a_network_is_never_pickled(saved: Path) -> None:
    for name in (WEIGHTS, PLAN):
        with pytest.raises(pickle.UnpicklingError):
            pickle.loads((saved / name).read_bytes())
    # Only the example inputs are in torch's own format, which is read weights-only.
    names = [n for n in zipfile.ZipFile(saved / GRAPH).namelist() if n.endswith(".pt")]
    assert names == ["archive/data/sample_inputs/model.pt"]
