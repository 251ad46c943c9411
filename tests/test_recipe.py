"""Recipes: mistakes are named with their line, and a result's own recipe gives it again."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import fxfuse
from fxfuse.api.saved import GRAPH, PLAN, WEIGHTS
from fxfuse.cli.lazy import COMMANDS
from fxfuse.cli.recipe import Recipe, example, read_recipe, run, write_recipe
from fxfuse.cli.recipe.run import FILES
from fxfuse.cli.recipe.text import parse_recipe
from fxfuse.errors import FxfuseError, OptionError, OutputError
from fxfuse.members.checkpoint import read_state_dict, write_state_dict
from tests.models import excite

FACTORY = """
from torch import nn

def mlp(width=8, classes=3):
    return nn.Sequential(
        nn.Linear(5, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.1),
        nn.Linear(width, width), nn.ReLU(), nn.Linear(width, classes),
    )
"""
GOOD = """
model: recipe_models:mlp
members: [a.safetensors, b.safetensors]
input: [5]
output: {folder: fused}
"""


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a factory, two checkpoints and data; the working directory is another."""
    (tmp_path / "here").mkdir()
    (tmp_path / "recipe_models.py").write_text(FACTORY)
    names: dict[str, object] = {}
    exec(FACTORY, names)
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        member = excite(names["mlp"](), torch.randn(64, 5))  # type: ignore[operator]
        write_state_dict(tmp_path / f"{name}.safetensors", member.state_dict())
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((200, 5)).astype("float32")
    np.savez(tmp_path / "data.npz", inputs=inputs, labels=rng.integers(0, 3, 200))
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "recipe_models", raising=False)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return tmp_path


def recipe_in(work: Path, text: str = GOOD, **more: object) -> Recipe:
    content = yaml.safe_load(text)
    (work / "recipe.yaml").write_text(yaml.safe_dump({**content, **more}))
    return read_recipe(work / "recipe.yaml")


def test_a_recipe_fuses_as_the_python_interface_does(work: Path) -> None:
    outcome = run(recipe_in(work, fuse={"size": 1.5}))
    assert outcome.folder == work / "fused"
    assert sorted(p.name for p in outcome.folder.iterdir()) == sorted(outcome.files)
    assert set(outcome.files) == {WEIGHTS, GRAPH, PLAN, "summary.md", "recipe.yaml"}
    assert set(outcome.files) < set(FILES)
    from recipe_models import mlp

    members = [mlp(), mlp()]
    for member, name in zip(members, "ab", strict=True):
        member.load_state_dict(read_state_dict(work / f"{name}.safetensors"))
    expected = fxfuse.fuse(members, torch.randn(2, 5), size=1.5).state_dict()
    found = read_state_dict(work / "fused" / WEIGHTS)
    assert set(found) == set(expected)
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


#: Everything that training, refit and random numbers could make different.
EVERYTHING = {
    "calibration": {"source": "data.npz", "limit": 150},
    "fuse": {"refine": ["refit", {"match": {"steps": 5}}], "calibration": {"augmentations": 0}},
    "train": {"kind": "distill", "steps": 4},
    "evaluation": "data.npz",
    "seed": 3,
}


@pytest.mark.parametrize(
    "more",
    [
        {"fuse": {"size": 1.5, "method": {"name": "transplant", "score": "l1"}}},
        {"calibration": "data.npz", "fuse": {"method": {"score": "obs"}, "refine": ["refit"]}},
        {
            "calibration": "data.npz",
            "fuse": {"refine": [{"match": {"steps": 4, "learning_rate": 0.01}}]},
        },
        {"train": {"kind": "finetune", "steps": 4, "data": "data.npz"}},
        EVERYTHING,
    ],
)
def test_a_result_gives_itself_again_bit_for_bit(work: Path, more: dict[str, object]) -> None:
    first = run(recipe_in(work, **more))
    assert first.recipe.made is not None
    assert set(first.recipe.made.sha256) >= {"a.safetensors", "b.safetensors"}
    torch.manual_seed(99)
    again = read_recipe(work / "fused")
    assert again == first.recipe
    second = run(
        again.model_copy(
            update={
                "output": Recipe.model_validate(
                    {**yaml.safe_load(GOOD), "output": {"folder": str(work / "twice")}}
                ).output
            }
        )
    )
    for name in (WEIGHTS, GRAPH, PLAN):
        one, two = work / "fused" / name, second.folder / name
        assert one.read_bytes() == two.read_bytes(), name
    assert torch.initial_seed() == 99, "the caller's random numbers are left as they were"


def test_training_changes_the_network(work: Path) -> None:
    """Else the test above would compare what nothing was done to."""
    plain = run(recipe_in(work)).result.state_dict()
    for kind in ("distill", "finetune"):
        more = {"train": {"kind": kind, "steps": 3, "data": "data.npz"}}
        outcome = run(recipe_in(work, **more), force=True)
        assert outcome.trained
        assert outcome.trained in (work / "fused" / "summary.md").read_text()
        assert not torch.equal(outcome.result.state_dict()["0.weight"], plain["0.weight"])


def test_what_was_measured_is_in_the_summary(work: Path) -> None:
    outcome = run(recipe_in(work, evaluation={"source": "data.npz"}))
    names = [network.name for network in outcome.networks]
    assert names == ["member 0", "member 1", "ensemble of 2", "fused"]
    ensemble = outcome.networks[2]
    assert ensemble.agreement == 100
    assert ensemble.distance == 0
    with np.load(work / "data.npz") as data:
        answers = outcome.result.module(torch.from_numpy(data["inputs"])).argmax(1).numpy()
        expected = 100 * float((answers == data["labels"]).mean())
    assert outcome.networks[3].accuracy == pytest.approx(expected)
    assert "| ensemble of 2 |" in (work / "fused" / "summary.md").read_text()


def test_everything_that_can_be_written(work: Path) -> None:
    outcome = run(recipe_in(work, output={"folder": "fused", "report": True, "onnx": True}))
    assert {"report.html", "network.onnx"} < set(outcome.files)
    x = torch.randn(6, 5)
    assert torch.equal(fxfuse.load(outcome.folder)(x), outcome.result.module(x))


def test_members_with_arguments_of_their_own(work: Path) -> None:
    torch.manual_seed(5)
    from recipe_models import mlp

    write_state_dict(work / "c.safetensors", mlp(classes=2).state_dict())
    outcome = run(
        recipe_in(
            work,
            members=["a.safetensors", {"path": "c.safetensors", "args": {"classes": 2}}],
            fuse={"heads": {"output": "union", "classes": [["x", 1, "z"], ["z", "w"]]}},
        )
    )
    assert outcome.result.classes == ("x", "1", "z", "w")


def test_one_member_alone_is_pruned(work: Path) -> None:
    one = {"members": ["a.safetensors"], "evaluation": "data.npz"}
    outcome = run(recipe_in(work, **one, fuse={"size": {"width": 0.5}}))
    assert outcome.result.plan.n_members == 1
    assert [network.name for network in outcome.networks] == ["member 0", "pruned"]
    again = read_recipe(work / "fused")
    assert run(again, force=True).result.plan.digest == outcome.result.plan.digest
    with pytest.raises(OptionError, match="no heads"):
        recipe_in(work, **one, fuse={"heads": {"modules": ["6"]}})


def test_a_file_that_has_changed_is_named(work: Path) -> None:
    run(recipe_in(work))
    again = read_recipe(work / "fused")
    state = read_state_dict(work / "b.safetensors")
    state["0.bias"] = state["0.bias"] + 1
    write_state_dict(work / "b.safetensors", state)
    before = (work / "fused" / WEIGHTS).read_bytes()
    with pytest.raises(OptionError, match=r"b\.safetensors"):
        run(again, force=True)
    assert (work / "fused" / WEIGHTS).read_bytes() == before


def test_another_version_is_warned_of(work: Path) -> None:
    run(recipe_in(work))
    text = (work / "fused" / "recipe.yaml").read_text()
    (work / "fused" / "recipe.yaml").write_text(text.replace("torch: 2.", "torch: 1."))
    with pytest.warns(UserWarning, match=r"torch 1\."):
        run(read_recipe(work / "fused"), force=True)


def test_nothing_is_written_where_something_is_wrong(work: Path) -> None:
    before = sorted(p.name for p in work.iterdir())
    for more in (
        {"members": ["a.safetensors"]},
        {"members": ["a.safetensors", "nobody.safetensors"]},
        {"model": "recipe_models:nobody"},
        {"calibration": "nobody.npz"},
        {"fuse": {"refine": ["refit"]}},
        {"train": {"kind": "distill"}},
        {"fuse": {"plan": "a.safetensors"}},
    ):
        recipe = recipe_in(work, **more)
        (work / "recipe.yaml").unlink()
        with pytest.raises(FxfuseError):
            run(recipe)
        assert sorted(p.name for p in work.iterdir()) == before, more
    run(recipe_in(work))
    with pytest.raises(OutputError, match="fused exists already"):
        run(recipe_in(work))


#: Nine times nine, nine levels deep.
BOMB = "a0: &a0 [x, x]\n" + "".join(
    f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]\n" for level in range(1, 10)
)


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        (GOOD + "metod: average\n", 6, "no such field; did you mean model?"),
        (
            GOOD + "fuse:\n  metod: average\n",
            7,
            "fuse.metod: there is no such field; did you mean method?",
        ),
        (GOOD + "fuse:\n\n  method: avrage\n", 8, "did you mean average?"),
        (GOOD + "fuse:\n  method:\n    name: avrage\n", 7, "did you mean average?"),
        (GOOD + "fuse: {method: {score: l3}}\n", 6, "did you mean l2?"),
        (GOOD + "fuse:\n  method: {name: average, score: l1}\n", 7, "there are name, reference"),
        (GOOD + "fuse:\n  size:\n    allocation: atuo\n", 8, "did you mean auto?"),
        (GOOD + "fuse:\n  size: {multiple_of: 0}\n", 7, "must be at least 1"),
        (GOOD + "fuse:\n  task: clasification\n", 7, "did you mean classification?"),
        (GOOD + "fuse:\n  refine:\n    - mtch\n", 8, "there is no 'mtch'; did you mean match?"),
        (GOOD + "fuse:\n  refine:\n    - match: {step: 3}\n", 8, "did you mean steps?"),
        (GOOD + "fuse:\n  plan: p\n  size: 2\n  method: zip\n", 6, "holds method and size"),
        (GOOD + "train:\n  kind: distil\n", 7, "did you mean distill?"),
        (GOOD + "train:\n  steps: 0\n", 6, "greater than 0"),
        (GOOD + "train:\n  steps: many\n", 7, "valid integer"),
        (GOOD + "calibration:\n  limit: 3\n", 6, "calibration.source is missing"),
        (GOOD + "fuse:\n  constraints:\n    freeze: fc\n", 8, "valid list"),
        (GOOD + "seed: 1\nseed: 2\n", 7, "'seed' is given twice"),
        (GOOD + "members: [c]\n", 6, "'members' is given twice"),
        ("model: [", 1, "stream end"),
        ("model: a:b\nmembers: []\ninput: [5]\noutput: {folder: o}\n", 2, "at least 1 item"),
        ("members: [a, {pth: b}]\nmodel: a:b\ninput: 3\n", 1, "did you mean path?"),
        ("a: &a [*a]\n", 1, "alias"),
        (BOMB, 2, "the alias *a0 is not read"),
        ("x: [" + "0, " * 30_000 + "]", 1, "more than 20,000 values"),
        ("x: " + "9" * 5_000, 1, "a number is too long"),
        ("x: 0x" + "f" * 5_000, 1, "a number is too long"),
        ("x: " + "[" * 60 + "]" * 60, 1, "too deep"),
        ("", None, "nothing"),
        ("- a\n", None, "a list"),
        ("x: !!python/object/apply:os.system ['touch opened']\n", 1, "could not determine"),
    ],
)
def test_a_mistake_is_named_with_its_line(
    text: str, line: int | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OptionError) as found:
        parse_recipe(text, "recipe.yaml")
    assert said in str(found.value)
    assert found.value.what.startswith("the recipe ")
    assert found.value.where == ("recipe.yaml" if line is None else f"recipe.yaml, line {line}")
    assert not list(tmp_path.iterdir())


def test_every_mistake_is_named(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="2 mistakes") as found:
        parse_recipe(GOOD + "sed: 3\nfuse:\n  sise: 2\n")
    assert "line 6, sed" in found.value.why
    said = "line 8, fuse.sise: there is no such field; did you mean size?"
    assert said in found.value.why


def test_the_example_is_a_recipe_and_names_every_field() -> None:
    text = example()
    assert parse_recipe(text).model == "torchvision:resnet18"
    # With everything uncommented it is one, too, apart from a plan, which excludes other fields.
    whole = re.sub(r"^( *)#(?! )", r"\1", text, flags=re.MULTILINE)
    content = yaml.safe_load(whole)
    assert content["fuse"].pop("plan") is None
    found = Recipe.model_validate(content)
    assert found.fuse.method is not None
    assert found.fuse.method.make() == fxfuse.Transplant()
    known = Recipe.model_json_schema()
    assert set(known["properties"]) - {"base", "made"} == set(content)
    fields = known["$defs"]["Fuse"]["properties"]
    assert set(fields) == {*content["fuse"], "plan"}
    for part in known["$defs"].values():
        for name, field in part.get("properties", {}).items():
            words = field.get("description", "").split()
            # Of a result's own fields the example says nothing, and members stand in one line.
            if part["title"] not in ("Made", "Member") and name != "name":
                assert " ".join(words[:3]) in text, name


def test_a_recipe_is_written_as_it_is_read(tmp_path: Path) -> None:
    text = "fuse: {constraints: {output_dims: {0: [1]}}, size: {width: {'a*': 2.0}}, method: zip}\n"
    recipe = parse_recipe(GOOD + text)
    write_recipe(recipe, tmp_path / "recipe.yaml")
    text = (tmp_path / "recipe.yaml").read_text()
    assert parse_recipe(text) == recipe
    assert "base_member" not in text
    assert yaml.safe_load(text)["fuse"] == {
        "method": {"name": "zip"},
        "size": {"width": {"a*": 2.0}},
        "constraints": {"output_dims": {0: [1]}},
    }
    dumped = json.loads(recipe.model_dump_json())["fuse"]["constraints"]
    assert dumped["output_dims"] == {"0": [1]}


def test_short_forms_mean_what_long_ones_do() -> None:
    """Also in the schema for editors."""
    short = "fuse: {method: zip, size: 2, task: regression, refine: [refit, match]}\n"
    long = (
        "fuse: {method: {name: zip}, size: {width: 2}, task: {name: regression}, "
        "refine: [{refit: {}}, {match: }]}\n"
    )
    assert parse_recipe(GOOD + short) == parse_recipe(GOOD + long)
    schema = Recipe.model_json_schema()
    fields = schema["$defs"]["Fuse"]["properties"]
    assert {"type": "number"} in fields["size"]["anyOf"]
    assert "zip" in fields["method"]["anyOf"][0]["enum"]
    assert fields["refine"]["anyOf"][0]["items"]["anyOf"][0]["enum"] == ["refit", "match"]
    assert {"type": "string"} in schema["properties"]["members"]["items"]["anyOf"]


def test_every_command_has_a_file_of_its_name() -> None:
    folder = Path(fxfuse.__file__).parent / "cli" / "commands"
    for name in COMMANDS:
        assert (folder / f"{name}.py").is_file()
