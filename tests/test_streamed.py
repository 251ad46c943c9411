"""Members that stay in their files give the very network that loaded members give."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import fxfuse
from fxfuse import Members
from fxfuse.errors import (
    CheckpointError,
    MemberError,
    OptionError,
)
from fxfuse.members.checkpoint import Stored
from tests.nets import images, resnets
from tests.options import flat


class Tied(nn.Module):
    """A language model in small: the embedding is the head, and a table is no parameter."""

    def __init__(self, persistent: bool = True) -> None:
        super().__init__()
        self.words, self.inner = nn.Embedding(20, 8), nn.Linear(8, 6)
        self.outer, self.head = nn.Linear(6, 8), nn.Linear(8, 20, bias=False)
        self.head.weight = self.words.weight
        self.register_buffer("order", torch.arange(8).flip(0), persistent=persistent)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.words(ids)
        return self.head(x + self.outer(torch.relu(self.inner(x[..., self.order]))))


def saved(folder: Path, members: list[nn.Module], how: str) -> list[Path]:
    """The members' checkpoints in one of the formats."""
    paths = []
    for number, member in enumerate(members):
        state = member.state_dict()
        own = {name: t.clone() for name, t in state.items()}
        # Writers of safetensors leave names of tied tensors out.
        first = {t.data_ptr(): name for name, t in reversed(state.items())}
        own = {name: t for name, t in own.items() if first[state[name].data_ptr()] == name}
        if how == "pt":
            path = folder / f"{number}.pt"
            torch.save({"state_dict": state}, path)
        elif how == "safetensors":
            path = folder / f"{number}.safetensors"
            save_file(own, path)
        else:
            path = folder / f"{number}.safetensors.index.json"
            shards = {f"{number}-{part}.safetensors": list(own)[part::2] for part in range(2)}
            for file, names in shards.items():
                save_file({name: own[name] for name in names}, folder / file)
            weight_map = {name: file for file, names in shards.items() for name in names}
            path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        paths.append(path)
    return paths


def check_same(folder: Path, members: list[nn.Module], x: Any, how: str, **options: Any) -> None:
    loaded = fxfuse.fuse(members, x, **flat(**options))
    template = copy.deepcopy(members[0])
    for p in template.parameters():
        nn.init.zeros_(p)
    streamed = fxfuse.fuse(
        fxfuse.Members.from_files(saved(folder, members, how), template), x, **flat(**options)
    )
    assert streamed.plan.to_json() == loaded.plan.to_json()
    assert streamed.verification == loaded.verification
    expected, found = loaded.state_dict(), streamed.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    # The template is the caller's.
    assert all(not p.any() for p in template.parameters())


@pytest.mark.parametrize("how", ["safetensors", "sharded", "pt"])
def test_every_format(tmp_path: Path, how: str):
    torch.manual_seed(0)
    check_same(tmp_path, list(resnets(3)), images(), how)


@pytest.mark.parametrize(
    "options",
    [
        {"score": "l1", "width": 0.5},
        {"score": "bn_scale", "width": 1.5},
        {"width": 3},
        {"method": "average"},
        {"method": "weight_matching"},
        {"variant": "iterative", "freeze": ["stem.*"]},
    ],
)
def test_every_way_of_choosing(tmp_path: Path, options: dict[str, Any]):
    torch.manual_seed(0)
    check_same(tmp_path, list(resnets(3)), images(), "safetensors", **options)


@pytest.mark.parametrize("how", ["safetensors", "sharded", "pt"])
def test_tied_tensors(tmp_path: Path, how: str):
    torch.manual_seed(0)
    check_same(tmp_path, [Tied(), Tied()], torch.randint(0, 20, (2, 5)), how)


def test_a_plan_is_applied_again_to_files(tmp_path: Path):
    torch.manual_seed(0)
    members = list(resnets(2))
    paths = saved(tmp_path, members, "safetensors")
    first = fxfuse.fuse(members, images(), size=0.5)
    again = fxfuse.build(first.plan, Members.from_files(paths, members[1]), images())
    for name, tensor in first.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


def test_a_template_without_weights(tmp_path: Path):
    torch.manual_seed(0)
    members, ids = [Tied(), Tied()], torch.randint(0, 20, (2, 5))
    paths = saved(tmp_path, members, "safetensors")
    with torch.device("meta"):
        template = Tied()
    streamed = fxfuse.fuse(Members.from_files(paths, template), ids)
    expected = fxfuse.fuse(members, ids).module(ids)
    assert torch.equal(streamed.module(ids), expected)
    assert torch.equal(streamed.to_module()(ids), expected)
    assert template.words.weight.is_meta
    own = streamed.load_into(copy.deepcopy(template))
    assert torch.equal(own(ids), expected)
    assert own.head.weight is own.words.weight
    held = streamed.module.get_parameter("words.weight")
    assert own.words.weight.data_ptr() == held.data_ptr()


def test_what_no_checkpoint_holds_must_be_there(tmp_path: Path):
    members, ids = [Tied(False), Tied(False)], torch.randint(0, 20, (2, 5))
    paths = saved(tmp_path, members, "safetensors")
    with torch.device("meta"):
        template = Tied(False)
    with pytest.raises(MemberError, match=r"no values for a buffer(.|\n)*order"):
        fxfuse.fuse(Members.from_files(paths, template), ids)
    result = fxfuse.fuse(Members.from_files(paths, Tied(False)), ids)
    assert result.verification.passed
    with pytest.raises(MemberError, match="no values for a buffer"):
        result.load_into(template)


def test_one_member_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of all but the first member never more than one tensor of each is alive."""
    import weakref

    torch.manual_seed(0)
    members = list(resnets(6))
    paths = saved(tmp_path, members, "safetensors")
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0
    original = Stored.read

    def read(self: Stored, name: str) -> torch.Tensor:
        nonlocal most
        tensor = original(self, name)
        alive[:] = [ref for ref in alive if ref() is not None]
        alive.append(weakref.ref(tensor))
        most = max(most, sum(ref().numel() for ref in alive))
        return tensor

    template = copy.deepcopy(members[0])
    monkeypatch.setattr(Stored, "read", read)
    # Member 0 is loaded whole.
    whole = sum(t.numel() for t in members[0].state_dict().values())
    fxfuse.fuse(Members.from_files(paths, template), images())
    largest = max(t.numel() for t in members[0].state_dict().values())
    assert whole <= most <= whole + 2 * largest


def broken(kind: str, folder: Path) -> tuple[list[Any], dict[str, Any]]:
    """Files with one fault."""
    members: list[nn.Module] = list(resnets(2))
    how = "sharded" if kind in ("shard", "outside", "index", "lacking") else "safetensors"
    paths = saved(folder, members, how)
    options: dict[str, Any] = {"template": copy.deepcopy(members[0])}
    if kind == "missing":
        paths[1].unlink()
    elif kind == "folder":
        paths[1].unlink()
        paths[1].mkdir()
    elif kind == "truncated":
        paths[1].write_bytes(paths[1].read_bytes()[:-40])
    elif kind == "shard":
        (folder / "1-1.safetensors").unlink()
    elif kind in ("outside", "lacking"):
        index = json.loads(paths[1].read_text())
        name = next(iter(index["weight_map"]))
        index["weight_map"][name if kind == "outside" else "nobody"] = (
            "../0-0.safetensors" if kind == "outside" else "1-0.safetensors"
        )
        paths[1].write_text(json.dumps(index))
    elif kind == "index":
        paths[1].write_text("[]")
    elif kind == "dtype":
        save_file(
            {
                n: t.double() if t.is_floating_point() else t
                for n, t in members[1].state_dict().items()
            },
            paths[1],
        )
    elif kind in ("shape", "name", "nan"):
        state = {n: t.clone() for n, t in members[1].state_dict().items()}
        if kind == "shape":
            state["fc.weight"] = state["fc.weight"][:2].clone()
        elif kind == "name":
            del state["fc.weight"]
        else:
            state["fc.weight"][0, 0] = float("nan")
        save_file(state, paths[1])
    elif kind == "pickle":
        paths[1] = folder / "1.pt"
        torch.save(members[1], paths[1])
    elif kind == "mixed":
        return [paths[0], members[1]], options
    elif kind == "no template":
        options = {}
    elif kind == "template":
        return members, options
    elif kind == "calibrated":
        options |= {"calibration": images(100), "score": "obs"}
    elif kind == "heads":
        options["heads"] = ["fc"]
    elif kind == "label spaces":
        options["heads"] = "concat"
    return list(paths), options


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("missing", CheckpointError, "cannot open the checkpoint"),
        ("folder", CheckpointError, "cannot open the checkpoint(.|\n)*directory"),
        ("truncated", CheckpointError, "damaged"),
        ("shard", CheckpointError, "cannot open the checkpoint 1-1.safetensors"),
        ("outside", CheckpointError, "outside its folder"),
        ("lacking", CheckpointError, "lacks nobody"),
        ("index", CheckpointError, "weight_map"),
        ("dtype", CheckpointError, "other dtypes than the first checkpoint(.|\n)*float64"),
        ("shape", CheckpointError, "does not fit the model(.|\n)*fc.weight"),
        ("name", CheckpointError, "lacks fc.weight"),
        ("nan", MemberError, "member 1 holds weights that are not finite"),
        ("pickle", CheckpointError, "pickled"),
        ("mixed", OptionError, "some members are files"),
        ("no template", OptionError, "files need a template"),
        ("template", OptionError, "template= is for members in files\n"),
        ("calibrated", OptionError, "members in memory"),
        ("heads", OptionError, "members in memory"),
        ("label spaces", OptionError, "members in memory"),
    ],
)
def test_bad_input(tmp_path: Path, kind: str, error: type[Exception], message: str):
    torch.manual_seed(0)
    members, options = broken(kind, tmp_path)
    given = Members(members, options.pop("template", None))
    with pytest.raises(error, match=message):
        fxfuse.fuse(given, images(), **flat(**options))


def test_constants_are_compared(tmp_path: Path):
    members = [Tied(), Tied()]
    members[1].order = torch.arange(8)
    paths = saved(tmp_path, members, "safetensors")
    with pytest.raises(MemberError, match=r"differs from member 0: constants(.|\n)*order"):
        fxfuse.fuse(Members.from_files(paths, members[0]), torch.randint(0, 20, (2, 5)))
