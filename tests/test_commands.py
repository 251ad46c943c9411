"""The commands that work on what has been written, names of libraries, and `--quiet`."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner, Result

import fxfuse
from fxfuse.cli import show
from fxfuse.cli.app import app
from fxfuse.cli.lazy import COMMANDS
from fxfuse.cli.zoo import make_inputs, make_model
from fxfuse.errors import OptionError
from fxfuse.members.checkpoint import read_state_dict
from tests.forked import Child
from tests.forked import fxfuse as run_fxfuse
from tests.models import excite

FACTORY = """
from torch import nn

def cnn(width=8):
    return nn.Sequential(
        nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, width, 3), nn.BatchNorm2d(width), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3),
    )
"""
MODEL = ("--model", "command_models:cnn", "--input", "1,8,8")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a factory, two members, data and what was fused of them."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        folder = tmp_path_factory.mktemp("made")
        enter(folder, monkeypatch)
        fill()
    return folder


@pytest.fixture
def work(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    # What is in the recipe of the result is where it was made.
    recipe = tmp_path / "fused" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(made), str(tmp_path)))
    enter(tmp_path, monkeypatch)
    return tmp_path


def enter(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(show.out, "width", 200)
    monkeypatch.delenv("FXFUSE_DEBUG", raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.delitem(sys.modules, "command_models", raising=False)


def fill() -> None:
    Path("command_models.py").write_text(FACTORY)
    names: dict[str, object] = {}
    exec(FACTORY, names)
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((120, 1, 8, 8)).astype("float32")
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        member = excite(names["cnn"](), torch.from_numpy(inputs))  # type: ignore[operator]
        torch.save(member.state_dict(), f"{name}.pt")
    np.savez("data.npz", inputs=inputs, labels=rng.integers(0, 3, 120))
    assert invoke("fuse", "a.pt", "b.pt", *MODEL, "--out", "fused").exit_code == 0


#: Commands that read a result's folder.
ON_FOLDERS = ("run", "refit", "distill", "compare", "bench", "report")


def invoke(*arguments: object, trust: bool = True) -> Result:
    """Runs a command; the folders of these tests name a factory of their own, which is trusted."""
    trusted = ("--trust",) if trust and arguments[0] in ON_FOLDERS else ()
    return CliRunner().invoke(app, [str(argument) for argument in (*arguments, *trusted)])


def done(*arguments: object) -> Result:
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return result


def refused(*arguments: object) -> str:
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    return result.output


def distance(folder: str) -> float:
    """Distance from the ensemble, as `compare` says it."""
    rows = json.loads(done("compare", folder, "--data", "data.npz", "--json").stdout)
    return float(rows[-1]["distance"])


def test_run_makes_a_result_again(work: Path) -> None:
    done("run", "fused", "--out", "again")
    for name in ("fused.safetensors", "graph.json", "plan.json"):
        assert (work / "fused" / name).read_bytes() == (work / "again" / name).read_bytes()
    assert "exists" in refused("run", "fused")
    found = json.loads(done("run", "fused", "--force", "--json").stdout)
    assert found["out"] == "fused"
    assert "fused.safetensors" in found["files"]


def test_refit_and_distill_bring_it_closer_to_the_ensemble(work: Path) -> None:
    # Without the labels, which are random: the judge would go by them.
    with np.load("data.npz") as data:
        np.save("inputs.npy", data["inputs"])
    done("refit", "fused", "--calibration", "inputs.npy", "--out", "refitted")
    # What they do is kept in the recipe, so the next step can follow from another folder.
    (work / "elsewhere").mkdir()
    done("distill", "refitted", "--data", "inputs.npy", "--steps", 40, "--out", "distilled")
    matching = ("--refine", "refit,match", "--match-steps", 40)
    said = done("refit", "refitted", "--calibration", "inputs.npy", *matching, "--out", "matched")
    assert "judged on 18 inputs that no fit has seen (KL in nats)" in said.stdout
    assert "matched from" in (work / "matched" / "summary.md").read_text()
    folders = ("fused", "refitted", "distilled", "matched")
    before, refitted, distilled, matched = map(distance, folders)
    assert matched < refitted < before / 2
    assert distilled < refitted
    assert done("run", "distilled", "--out", "again")
    one, two = work / "distilled", work / "again"
    for name in ("fused.safetensors", "graph.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    recipe = yaml.safe_load((one / "recipe.yaml").read_text())
    assert recipe["fuse"]["refine"] == [{"refit": {}}]
    assert recipe["train"]["steps"] == 40


def test_labels_train_too(work: Path) -> None:
    said = done("distill", "fused", "--data", "data.npz", "--kind", "finetune", "--out", "tuned")
    assert "Fine-tuned on labels in 300 steps" in said.stdout
    with np.load("data.npz") as data:
        np.save("unlabelled.npy", data["inputs"])
    unlabelled = ("--data", "unlabelled.npy", "--kind", "finetune", "--out", "x")
    assert "no labels" in refused("distill", "fused", *unlabelled)
    assert not (work / "x").exists()


def test_compare_says_what_networks_answer(work: Path) -> None:
    done("stack", "a.pt", "b.pt", *MODEL, "--out", "stacked")
    # The stack is the mean of logits.
    task = ("--task", "classification", "--task-combine-by", "logits")
    asked = ("compare", "fused", "stacked", "--data", "data.npz", "--json", "--no-latency")
    result = done(*asked, *task)
    rows = {row["name"]: row for row in json.loads(result.stdout)}
    assert list(rows) == ["member 0", "member 1", "ensemble of 2", "fused", "stacked"]
    assert rows["stacked"]["agreement_percent"] == 100
    assert rows["stacked"]["distance"] < 1e-6
    assert rows["stacked"]["distance_unit"] == "KL in nats"
    both = {"accuracy_percent", "agreement_percent", "distance", "nll_nats", "brier"}
    both |= {"ece_percent", "equivalent_members"}
    assert set(rows["fused"]["intervals"]) == both
    for name, (low, high) in rows["fused"]["intervals"].items():
        assert low <= rows["fused"][name] <= high or name == "ece_percent"
    rows = {row["name"]: row for row in json.loads(done(*asked).stdout)}
    assert rows["stacked"]["distance"] > 1e-6
    done(
        "stack", "a.pt", "b.pt", *MODEL, "--reduce", "probabilities", "--out", "stacked", "--force"
    )
    rows = {row["name"]: row for row in json.loads(done(*asked).stdout)}
    assert rows["stacked"]["agreement_percent"] == 100
    assert rows["stacked"]["distance"] < 1e-6
    assert rows["fused"]["parameters"] == rows["member 0"]["parameters"]
    assert rows["fused"]["latency_ms"] is None
    with np.load("data.npz") as data:
        answers = fxfuse.load("fused")(torch.from_numpy(data["inputs"])).argmax(1).numpy()
        assert rows["fused"]["accuracy_percent"] == pytest.approx(
            100 * (answers == data["labels"]).mean()
        )
    table = done("compare", "fused", "--data", "data.npz").stdout
    assert "latency" in table
    assert "ensemble of 2" in table


def test_compare_in_another_precision(work: Path) -> None:
    asked = ("compare", "fused", "--data", "data.npz", "--json", "--no-latency")
    rows = {r["name"]: r for r in json.loads(done(*asked, "--dtype", "bfloat16").stdout)}
    own, cast = rows["fused"], rows["fused, bfloat16"]
    assert cast["distance"] == pytest.approx(own["distance"], rel=0.1)
    assert cast["distance"] != own["distance"]
    assert cast["accuracy_percent"] == pytest.approx(own["accuracy_percent"], abs=5)
    assert "unsupported dtype torch.int8" in refused(*asked, "--dtype", "int8")
    assert "unknown quantize 'int5'" in refused(*asked, "--quantize", "int5")
    pytest.importorskip("torchao")
    rows = {r["name"]: r for r in json.loads(done(*asked, "--quantize", "int8").stdout)}
    assert rows["fused, int8"]["distance"] == pytest.approx(own["distance"], rel=0.1)


def test_compare_needs_the_same_members(work: Path) -> None:
    done("fuse", "b.pt", "a.pt", *MODEL, "--out", "other")
    assert "different members" in refused("compare", "fused", "other")
    state = read_state_dict("a.pt")
    torch.save({name: value * 1 + 1 for name, value in state.items()}, "a.pt")
    assert "has changed" in refused("compare", "fused")


def test_bench_times_three_networks(work: Path) -> None:
    rows = json.loads(done("bench", "fused", "--batch", 2, "--batch", 3, "--json").stdout)
    assert [(row["network"], row["batch"]) for row in rows] == [
        (name, batch) for batch in (2, 3) for name in ("one member", "ensemble", "fused")
    ]
    assert all(row["latency_ms"] > 0 for row in rows)
    assert rows[0]["ratio_to_one_member"] == 1
    assert "of one member" in done("bench", "fused").stdout


def test_bench_compiles(work: Path) -> None:
    rows = json.loads(done("bench", "fused", "--batch", 2, "--compiled", "--json").stdout)
    assert [row["how"] for row in rows] == ["eager"] * 3 + ["compiled"] * 3


STRANGE = """
from pathlib import Path
Path("opened").touch()
"""


@pytest.mark.parametrize("command", ON_FOLDERS)
@pytest.mark.parametrize("spec", ["strange:model", "subprocess:check_output", "builtins:eval"])
def test_a_folder_imports_nothing_that_only_it_names(work: Path, command: str, spec: str) -> None:
    (work / "strange.py").write_text(STRANGE)
    recipe = yaml.safe_load((work / "fused" / "recipe.yaml").read_text())
    arguments = {"strange:model": {}, "subprocess:check_output": {"args": ["touch", "opened"]}}
    recipe |= {"model": spec, "model_args": arguments.get(spec, {"source": "open('opened', 'w')"})}
    (work / "fused" / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    more = {
        "run": ("--out", "other"),
        "refit": ("--calibration", "inputs.npy", "--out", "other"),
        "distill": ("--data", "data.npz", "--out", "other"),
    }
    result = invoke(command, "fused", *more.get(command, ()), trust=False)
    assert result.exit_code == 2, result.output
    assert f"{spec!r} is not imported only because a folder names it" in result.output
    assert "--trust" in result.output
    assert not (work / "opened").exists()
    assert "strange" not in sys.modules
    if command != "bench":
        known = ("--model", "command_models:cnn", *more.get(command, ()))
        np.save("inputs.npy", np.load("data.npz")["inputs"])
        recipe["model_args"] = {}
        (work / "fused" / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        result = invoke(command, "fused", *known, trust=False)
        assert result.exit_code == 0, result.output
    assert not (work / "opened").exists()


@pytest.mark.parametrize("field", ["calibration", "evaluation", "train"])
def test_a_folder_reads_no_data_from_a_function_that_only_it_names(work: Path, field: str) -> None:
    (work / "strange.py").write_text(STRANGE)
    recipe = yaml.safe_load((work / "fused" / "recipe.yaml").read_text())
    source: Any = {"source": "strange:data"}
    recipe[field] = {"kind": "distill", "data": source} if field == "train" else source
    (work / "fused" / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    known = ("--model", "command_models:cnn", "--out", "other")
    result = invoke("run", "fused", *known, trust=False)
    assert result.exit_code == 2, result.output
    assert "'strange:data' is not imported" in result.output
    assert not (work / "opened").exists()


def test_a_folder_shadows_no_library(work: Path) -> None:
    """The working directory follows a recipe into its `base`, but imports do not."""
    (work / "fused" / "timm.py").write_text(STRANGE)
    recipe = yaml.safe_load((work / "fused" / "recipe.yaml").read_text())
    recipe |= {"model": "timm:nobody", "base": str(work / "fused")}
    (work / "fused" / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    code, _, err = Child(run_fxfuse, "compare", "fused", cwd=work).ended()
    assert code == 2, err
    assert "timm has no network 'nobody'" in err
    assert not list(work.rglob("opened"))


@pytest.mark.parametrize(
    ("spec", "argument"),
    [
        ("timm:resnet18", {"checkpoint_path": "evil.pt"}),
        ("timm:resnet18", {"pretrained_cfg": {"file": "evil.pt"}}),
        ("timm:resnet18", {"pretrained_cfg_overlay": {"file": "evil.pt"}}),
        ("hf:own", {"trust_remote_code": True}),
    ],
)
def test_libraries_are_not_asked_to_load_code(
    work: Path, spec: str, argument: dict[str, Any]
) -> None:
    pytest.importorskip("timm")
    pytest.importorskip("transformers")
    (work / "own").mkdir()
    (work / "own" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(OptionError, match="are made without"):
        make_model(spec, argument)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"model_type": "nobody", "auto_map": {"AutoConfig": "own.Config"}}, "custom code"),
        ({"model_type": "bert", "attn_implementation": "evil/kernel"}, "code from the network"),
    ],
)
def test_a_folder_of_transformers_brings_no_code(work: Path, entry: Any, said: str) -> None:
    pytest.importorskip("transformers")
    (work / "own").mkdir()
    (work / "own" / "config.json").write_text(json.dumps(entry))
    (work / "own" / "own.py").write_text(STRANGE)
    with pytest.raises(OptionError, match=said):
        make_model("hf:own", {})
    assert not (work / "opened").exists()


@pytest.mark.parametrize("content", ["[" * 100_000, f"[{'1,' * (1 << 22)}1]", " " * (1 << 26)])
def test_lists_and_configurations_have_bounds(work: Path, content: str) -> None:
    pytest.importorskip("transformers")
    (work / "own").mkdir()
    (work / "own" / "config.json").write_text(content)
    with pytest.raises(OptionError, match="unusable configuration"):
        make_model("hf:own", {})
    fuse = ("fuse", "b.pt", *MODEL, "--out", "x")
    (work / "classes.json").write_text(content)
    classes = ("--heads", "2", "--head-output", "union", "--classes", "classes.json")
    assert "cannot be read" in refused(*fuse, "a.pt", *classes)
    (work / "a.safetensors.index.json").write_text(content)
    assert "holds no weight_map" in refused(*fuse, "a.safetensors.index.json")


def test_report_on_what_was_written(work: Path) -> None:
    done("report", "fused", "--data", "data.npz")
    page = (work / "fused" / "report.html").read_text()
    assert "2 networks fused into one" in page
    assert "ensemble of 2" in page
    done("distill", "fused", "--data", "data.npz", "--steps", 3, "--out", "matched")
    done("report", "matched", "--out", "page.html", "--data", "data.npz")
    # The weights are those of the folder, not those that the plan alone would give.
    rows = json.loads(done("compare", "matched", "--data", "data.npz", "--json").stdout)
    assert f"{rows[-1]['distance']:.4f}" in (work / "page.html").read_text()
    (work / "fused" / "plan.json").unlink()
    assert "no plan" in refused("report", "fused")


def test_recipe_command(work: Path) -> None:
    (work / "recipe.yaml").write_text(done("recipe", "--example").stdout)
    assert "holds no mistake" in done("recipe", "recipe.yaml").stdout
    assert json.loads(done("recipe", "recipe.yaml", "--json").stdout)["input"] == [3, 224, 224]
    schema = json.loads(done("recipe", "--schema").stdout)
    assert "members" in schema["required"]
    (work / "recipe.yaml").write_text("modell: a\n")
    told = refused("recipe", "recipe.yaml")
    assert "did you mean model?" in told
    assert refused("recipe")
    assert refused("recipe", "--schema", "--example")
    assert "the recipe nobody.yaml cannot be read" in refused("run", "nobody.yaml")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str) -> None:
    said = done(command, "--help").stdout
    assert "--quiet" in said


def test_quiet_says_nothing_but_what_is_asked_for(work: Path) -> None:
    result = done("fuse", "a.pt", "b.pt", *MODEL, "--out", "other", "--quiet")
    assert result.output == ""
    assert (work / "other").is_dir()
    assert json.loads(done("analyze", *MODEL, "-q", "--json").stdout)["groups"]
    assert "exists" in refused("fuse", "a.pt", "b.pt", *MODEL, "--out", "other", "-q")
    assert done("compare", "fused").stdout


def test_names_of_libraries() -> None:
    network = make_model("torchvision:mobilenet_v3_small", {"num_classes": 7})
    assert type(network).__name__ == "MobileNetV3"
    with pytest.raises(OptionError, match="use resnet18"):
        make_model("torchvision:resnet81", {})
    with pytest.raises(OptionError, match=r"no config\.json"):
        make_model("hf:/nobody", {})


def test_token_ids() -> None:
    (ids,) = make_inputs("ids:7:30")
    assert ids.shape == (2, 7)
    assert ids.dtype == torch.int64
    assert 0 <= int(ids.min()) <= int(ids.max()) < 30


@pytest.fixture
def pretrained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two folders that save_pretrained of transformers wrote."""
    from transformers import BertConfig, BertForSequenceClassification

    monkeypatch.chdir(tmp_path)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 32}
    config = BertConfig(vocab_size=50, num_attention_heads=2, num_labels=3, **sizes)
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        BertForSequenceClassification(config).save_pretrained(name)
    return tmp_path


def test_networks_of_transformers(pretrained: Path) -> None:
    """Their folders are members, of the class that they name, and the result is one, too."""
    done("fuse", "a", "b", "--model", "hf:a", "--input", "ids:12:50", "--out", "fused")
    made = make_model("hf:b", {})
    assert type(made).__name__ == "BertForSequenceClassification"
    made.load_state_dict(read_state_dict("fused/fused.safetensors"), strict=True)
    ids = torch.randint(50, (3, 12))
    loaded = fxfuse.load("fused")
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, made(ids).logits)
    made.save_pretrained("whole")
    with torch.no_grad():
        torch.testing.assert_close(make_model("hf:whole", {})(ids).logits, loaded(ids).logits)
    done("run", "fused", "--out", "again")
    graph = (pretrained / "again" / "graph.json").read_bytes()
    assert graph == (pretrained / "fused" / "graph.json").read_bytes()
    hashes = yaml.safe_load((pretrained / "fused" / "recipe.yaml").read_text())["made"]["sha256"]
    assert set(hashes) == {"a/model.safetensors", "b/model.safetensors"}


def test_a_graph_says_what_class_it_misses(pretrained: Path) -> None:
    """In a process that never imported it; what fails is not printed as a traceback."""
    done("fuse", "a", "b", "--model", "hf:a", "--input", "ids:12:50", "--out", "fused")
    script = "import sys; sys.modules['transformers'] = None; import fxfuse; fxfuse.load('fused')"
    _, _, err = Child(exec, script, {}, cwd=pretrained).ended()
    assert "SequenceClassifierOutput" in err
    assert "must have been imported before" in err
    assert "W1" not in err


def test_networks_of_timm() -> None:
    assert type(make_model("timm:convnext_atto", {"num_classes": 3})).__name__ == "ConvNeXt"
    with pytest.raises(OptionError, match="use convnext_atto"):
        make_model("timm:convnxt_atto", {})


def test_sweep_writes_a_table_and_a_chart(work: Path) -> None:
    asked = ("sweep", "a.pt", "b.pt", *MODEL, "--no-verify", "--sizes", "0.5,1", "--out", "sizes")
    calibrated = ("--calibration", "data.npz", "--refine", "refit")
    result = done(*asked, *calibrated, "--json")
    told = json.loads(result.stdout)
    names = ["best member", "ensemble of 2", "size 0.5", "size 1"]
    assert [row["name"] for row in told["networks"]] == names
    assert told["networks"][2]["parameters"] < told["networks"][3]["parameters"]
    assert all(told["networks"][i]["distance"] > 0 for i in (0, 2, 3))
    assert "size 0.5 |" in (work / "sizes/sweep.md").read_text()
    assert "floating-point operations" in (work / "sizes/sweep.svg").read_text()
    assert fxfuse.load("sizes/0.5")(torch.randn(2, 1, 8, 8)).shape[0] == 2
    assert "contradict each other" in refused(*asked, "--width", "1")
    assert "cannot be read" in refused(*asked[:-4], "--sizes", "0.5,x", "--out", "sizes")
    assert "exists already" in refused(*asked)


def test_a_name_without_its_library() -> None:
    with pytest.raises(OptionError, match="did you mean torchvision:resnet18"):
        make_model("resnet18", {})
    with pytest.raises(OptionError, match="did you mean torchvision:resnet18"):
        make_model("resnet81", {})
