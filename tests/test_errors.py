"""Errors: complete messages, one class per bad input, safe across processes."""

from __future__ import annotations

import fcntl
import inspect
import os
import pickle
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fxfuse
from benchmarks.errors_page import classes, pages, parts
from fxfuse import Constraints, Example, Heads, Refit, Transplant, errors
from fxfuse.api.checks import verified
from fxfuse.cli.recipe import read_recipe
from fxfuse.cli.sources import read_data
from fxfuse.cli.zoo import make_model
from fxfuse.common.output import check_output, locked
from fxfuse.errors import FxfuseError
from fxfuse.members.checkpoint import load_checkpoint, read_file, read_state_dict
from fxfuse.members.ranks import Ranks
from fxfuse.planning.scores.registry import score
from fxfuse.refine import match
from fxfuse.runtime import RemoveDropout
from fxfuse.transform.emit import SwitchTraining
from fxfuse.verify import Check

CLASSES = [
    value
    for _, value in inspect.getmembers(errors, inspect.isclass)
    if issubclass(value, FxfuseError)
]


def test_the_page_shows_what_wrong_calls_say_and_each_names_the_fix():
    """`python -m benchmarks.errors_page` writes it; a call without an error, or a fix, raises."""
    for page, text in pages().items():
        assert page.read_text(encoding="utf-8") == text


def test_message_has_all_parts_in_order():
    error = FxfuseError("what.", where="node", why="because", how="do this")
    assert str(error).splitlines() == [
        "what.",
        "  where: node",
        "  why: because",
        "  how to fix: do this",
    ]


def test_empty_parts_are_left_out():
    assert str(FxfuseError("what.", how="do this")) == "what.\n  how to fix: do this"
    assert str(FxfuseError("what.")) == "what."


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_class_survives_pickling_and_is_described(kind):
    error = pickle.loads(pickle.dumps(kind("what", where="here", why="because", how="so")))
    assert type(error) is kind
    assert (error.what, error.where, error.why, error.how) == ("what", "here", "because", "so")
    assert inspect.getdoc(kind)


def test_bad_inputs_of_the_command_line_each_have_a_class_of_their_own():
    names = {kind.__name__ for kind in CLASSES}
    assert {
        "MemberError",
        "InputError",
        "CaptureError",
        "OptionError",
        "CheckpointError",
        "PlanError",
        "OutputError",
    } <= names


def net(width: int = 4, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Dropout(0.1), nn.Linear(width, 2))


class Branch(nn.Module):
    """Its way depends on the data, so torch.export rejects it."""

    def __init__(self, other: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)
        if other:
            self.third = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x))
        if x.sum() < -1:
            return self.third(x) if hasattr(self, "third") else -self.second(x)
        return self.second(x)


class Silent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> None:
        self.layer(x)


def _nan() -> nn.Module:
    module = net()
    nn.init.constant_(module[0].weight, float("nan"))
    return module


def _sparse() -> nn.Module:
    module = net()
    module.register_buffer("table", torch.eye(2).to_sparse())
    return module


def _file(folder: Path, name: str, content: object) -> Path:
    path = folder / name
    torch.save(content, path)
    return path


def _busy(folder: Path) -> None:
    other = os.open(folder / ".out.lock", os.O_CREAT | os.O_RDWR)
    fcntl.flock(other, fcntl.LOCK_EX)
    with locked(folder / "out"):
        pass


X = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
two = partial(fxfuse.fuse, [net(), net(seed=1)], X)


#: One way to each error, and none by raising it oneself.
def another_rank_fails(folder: Path) -> None:
    """What a rank sees when another one is out of memory."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    try:
        with patch.object(dist, "all_gather_object") as gather:
            gather.side_effect = lambda found, *_, **__: found.__setitem__(0, ("MemoryError", None))
            Ranks("world").all(lambda: None)
    finally:
        dist.destroy_process_group()


def no_compiler(folder: Path) -> None:
    """Packaging where there is no C++ compiler."""
    with patch.object(torch._inductor, "aoti_compile_and_package", side_effect=RuntimeError):
        fxfuse.package(two(verify=False), folder / "model.pt2")


RAISES: list[tuple[str, Callable[[Path], object]]] = [
    ("MemberError", lambda _: fxfuse.fuse([net()], X)),
    ("OptionError", lambda _: two(constraints=Constraints(freeze=["nobody"]))),
    ("OptionError", lambda _: two(size=0)),
    ("OptionError", lambda _: two(heads=Heads(output="union", classes=[["a"], ["b"]]))),
    ("MemberError", lambda _: fxfuse.fuse([net(), nn.Sequential(*net(), nn.ReLU())], X)),
    ("MemberError", lambda _: fxfuse.fuse([net(), _nan()], X)),
    ("MemberError", lambda _: fxfuse.fuse([net().to("meta") for _ in "ab"], X.to("meta"))),
    ("MemberError", lambda _: fxfuse.fuse([_sparse(), _sparse()], X)),
    ("InputError", lambda _: fxfuse.fuse([net(), net()], X[:, :2])),
    ("CaptureError", lambda _: fxfuse.capture(Silent(), X)),
    ("CaptureError", lambda _: fxfuse.fuse([Branch(False), Branch(False)], X).module),
    (
        "RewriteError",
        lambda _: fxfuse.fuse(
            [torch.export.export(net(seed=s).eval(), (X,)) for s in range(2)], X
        ).to_module(),
    ),
    ("CaptureError", lambda _: fxfuse.fuse([Branch(True), Branch(True)], X)),
    ("OptionError", lambda _: two(method="alchemy")),
    ("OptionError", lambda _: two(method=Transplant(score="vibes"))),
    (
        "InputError",
        lambda _: fxfuse.fuse(
            [net(), net(seed=1)], Example(X, dynamic_shapes=({},)), verify=False
        ).module(X[:1]),
    ),
    ("InputError", lambda _: two(refine=[Refit()])),
    ("InputError", lambda folder: read_data(str(folder / "nothing.here"))),
    ("OptionError", lambda _: fxfuse.analyze(net(), X).explain("nobody", 0)),
    ("PlanError", lambda _: fxfuse.fuse([nn.Linear(3, 2), nn.Linear(3, 2)], X)),
    ("VerificationError", lambda _: verified([Check("permutation", 1.0, 0.0, False)])),
    ("PlanError", lambda _: fxfuse.FusionPlan.from_json("{}")),
    (
        "PlanError",
        lambda _: fxfuse.build(two(verify=False).plan, [net(seed=5), net(seed=6)], X),
    ),
    ("RewriteError", lambda _: SwitchTraining()(two(verify=False).module)),
    ("RewriteError", lambda _: RemoveDropout()(two(verify=False).module)),
    ("OptionError", lambda folder: fxfuse.package(two(verify=False), folder / "model.bin")),
    ("CompileError", no_compiler),
    ("RewriteError", lambda _: fxfuse.unstack(net())),
    ("RuleError", lambda _: score("l2")(lambda *_: {})),
    ("CheckpointError", lambda folder: read_file(folder / "nobody.pt")),
    ("CheckpointError", lambda folder: read_state_dict(_file(folder, "a.pt", [1]))),
    ("CheckpointError", lambda folder: read_state_dict(_file(folder, "a.pt", net()))),
    (
        "CheckpointError",
        lambda folder: load_checkpoint(net(5), _file(folder, "a.pt", net().state_dict())),
    ),
    ("OptionError", lambda _: make_model("nobody:factory", {})),
    ("OutputError", lambda folder: check_output(folder, ["weights"])),
    ("OutputError", _busy),
    ("OptionError", read_recipe),
    ("CheckpointError", fxfuse.load),
    ("MemberError", another_rank_fails),
    ("RefineError", lambda _: match(two(verify=False).module.requires_grad_(False), [net()], X)),
    (
        "MissingDependencyError",
        lambda folder: fxfuse.export_onnx(two(verify=False), folder / "a.onnx"),
    ),
]


@pytest.mark.filterwarnings("ignore:torch.export rejects")
@pytest.mark.parametrize(("kind", "cause"), RAISES)
def test_every_error_is_raised_by_something(
    kind: str, cause: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys.modules["fxfuse.runtime.onnx"], "find_spec", lambda name: None)
    with pytest.raises(FxfuseError) as found:
        cause(tmp_path)
    assert type(found.value).__name__ == kind
    assert found.value.what


def test_every_error_has_a_cause_and_a_fix():
    assert {kind.__name__ for kind in classes()} == {kind for kind, _ in RAISES}
    for kind in classes():
        cause, fix = parts(kind)
        assert cause.endswith("."), kind
        assert fix.endswith("."), kind
