"""The command line: what it writes, and that bad input exits 2 and leaves nothing behind."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import fxfuse
from fxfuse.cli import show
from fxfuse.cli.app import app
from fxfuse.cli.lazy import COMMANDS
from fxfuse.cli.zoo import make_inputs, make_model, parse_model_args
from fxfuse.errors import InputError, OptionError
from fxfuse.members.checkpoint import read_state_dict
from tests.forked import Child
from tests.forked import fxfuse as run_fxfuse

MODELS = """
import time
import torch
from torch import nn

def mlp(width=8, classes=3):
    return nn.Sequential(nn.Linear(5, width), nn.ReLU(), nn.Linear(width, classes))

class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 5)
    def forward(self, x):
        if x.sum() > 0:
            return self.layer(x)
        return self.layer(self.layer(x))

class Opaque(Branching):
    def forward(self, x):
        return Answer(super().forward(x))

class Answer:
    def __init__(self, logits):
        self.logits = logits

class Slow(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 5)
    def forward(self, x):
        print("started", flush=True)
        time.sleep(120)
        return self.layer(x)

class Limited(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(2))
        self.head = nn.Linear(5, 3)
    def forward(self, x):
        for layer in self.layers:
            x = torch.renorm(layer(x), 2.0, 0, 1.0)
        return self.head(x)

class ReturnsNone(nn.Module):
    def forward(self, x):
        return None

def meta():
    return mlp().to("meta")

def half():
    return mlp().half()

def complex_numbers():
    return nn.Sequential(*(nn.Linear(a, b, dtype=torch.complex64) for a, b in ((5, 8), (8, 3))))

def no_parameters():
    return nn.ReLU()

def sparse():
    model = nn.Linear(5, 5)
    model.weight = nn.Parameter(model.weight.detach().to_sparse())
    return model

class Packed(nn.Linear):
    def get_extra_state(self):
        return {"packed": b"weights"}
    def set_extra_state(self, state):
        pass

def packed():
    return Packed(5, 5)

def broken():
    raise ZeroDivisionError("broken on purpose")

def number():
    return 3

value = 3
"""
MODEL = ["--model", "cli_models:mlp", "--input", "5"]


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A working directory with factories and two checkpoints of a small network."""
    (tmp_path / "cli_models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    # The consoles read COLUMNS once, when they are made; typer's own messages read it each time.
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(show.out, "width", 200)
    monkeypatch.delenv("FXFUSE_DEBUG", raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.delitem(sys.modules, "cli_models", raising=False)
    for name in ("a", "b"):
        torch.save(mlp().state_dict(), f"{name}.pt")
    torch.save(torch.full((2, 5), float("nan")), "nan.pt")
    torch.save(torch.ones(2, 5, dtype=torch.float64), "double.pt")
    torch.save(torch.ones(0, 5), "empty.pt")
    return tmp_path


def mlp(width=8, classes=3):
    return nn.Sequential(nn.Linear(5, width), nn.ReLU(), nn.Linear(width, classes))


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def listing(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def refused(work, *arguments):
    """Runs bad input; returns the message after the checks that hold for every one of them."""
    before = listing(work)
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert result.stdout == ""
    assert listing(work) == before
    return result.stderr


# --- what works ---


def test_analyze_prints_groups_and_reasons(work):
    result = invoke("analyze", *MODEL)
    assert result.exit_code == 0, result.output
    assert "0.weight[0]" in result.stdout
    assert "free fraction: 96.00%" in result.stdout


def test_analyze_json(work):
    result = invoke("analyze", *MODEL, "--model-arg", "width=6", "--json")
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    (group,) = content["groups"]
    assert group["n_units"] == 6
    tensors = {(entry["tensor"], entry["dim"]) for entry in group["tensors"]}
    assert tensors == {("0.weight", 0), ("0.bias", 0), ("2.weight", 1)}
    assert {entry["tensor"] for entry in content["frozen"]} == {"0.weight", "2.weight", "2.bias"}
    assert content["free_fraction"] > 0.9


def test_a_network_that_cannot_be_exported_is_traced(work):
    with pytest.warns(UserWarning, match="torch.export rejects Branching"):
        result = invoke("analyze", "--model", "cli_models:Branching", "--input", "5")
    assert result.exit_code == 0, result.output
    assert "free fraction" in result.stdout


def test_a_traced_ensemble_is_verified_without_the_wide_oracle(work):
    for name in ("a", "b"):
        torch.save({"layer.weight": torch.randn(5, 5), "layer.bias": torch.randn(5)}, f"{name}.pt")
    model = ("--model", "cli_models:Branching", "--input", "5")
    with pytest.warns(UserWarning, match=r"wide equals ensemble: not run, because torch\.export"):
        result = invoke("verify", "a.pt", "b.pt", *model)
    assert result.exit_code == 0, result.output
    assert "permutation" in result.stdout


def test_analyze_explains_what_is_frozen_inside(work):
    result = invoke("analyze", "--model", "cli_models:Limited", "--input", "5")
    assert result.exit_code == 0, result.output
    inside = result.stdout.partition("Frozen inside the network:")[2]
    assert inside
    for words in (
        "4 dimensions (base): goes into aten.renorm.default, which has no rule",
        # Names that differ in numbers only are one line.
        "layers.*.weight[0] x 2, layers.*.bias[0] x 2",
        "at: renorm, renorm_1",
        "cli_models.py:",
        "x = torch.renorm(layer(x), 2.0, 0, 1.0)",
        "a rule for aten.renorm.default belongs in fxfuse/analysis/rules/normalisation.py",
        "aten.renorm.default at renorm, renorm_1: no rule",
    ):
        assert words in inside, words
    # Inputs, outputs and integer constants are no faults of the network.
    interface = result.stdout.partition("Frozen as the network's interface:")[2]
    assert "reaches the network's output" in interface.partition("Frozen inside")[0]
    assert "reaches the network's output" not in inside
    assert "Frozen inside" not in invoke("analyze", *MODEL).stdout


def test_analyze_strict(work):
    limited = ("analyze", "--model", "cli_models:Limited", "--input", "5", "--strict")
    for more in ((), ("--json",)):
        result = invoke(*limited, *more)
        assert result.exit_code == 1, result.output
        assert "aten.renorm.default" in result.stdout
    covered = invoke("analyze", *MODEL, "--strict")
    assert covered.exit_code == 0, covered.output
    assert "without a rule" not in covered.stdout
    assert "Exits 0" in invoke("analyze", "--help").stdout


def test_analyze_json_holds_every_reason(work):
    result = invoke("analyze", "--model", "cli_models:Limited", "--input", "5", "--json")
    content = json.loads(result.stdout)
    (missing,) = content["without_rule"]
    assert missing["operator"] == "aten.renorm.default"
    assert missing["nodes"] == ["renorm", "renorm_1"]
    assert missing["rule_file"] == "fxfuse/analysis/rules/normalisation.py"
    assert not missing["has_rule"]
    assert len(missing["sources"]) == 2
    frozen = {(entry["tensor"], entry["dim"]): entry for entry in content["frozen"]}
    inner = frozen[("layers.0.weight", 0)]
    assert inner["operator"] == "aten.renorm.default"
    assert inner["rule_file"] == "fxfuse/analysis/rules/normalisation.py"
    assert (inner["interface"], inner["count"], inner["size"]) == (False, 5, 5)
    assert "cli_models.py" in inner["source"]
    assert frozen[("layers.0.weight", 1)]["interface"]
    assert frozen[("head.bias", 0)]["interface"]


def test_a_network_on_the_meta_device_is_analysed(work):
    result = invoke("analyze", "--model", "cli_models:meta", "--input", "5", "--strict")
    assert result.exit_code == 0, result.output
    assert "free fraction: 96.00%" in result.stdout


def test_unusual_networks_are_analysed(work):
    for model, free in (("half", 96), ("complex_numbers", 96), ("no_parameters", 0)):
        result = invoke("analyze", "--model", f"cli_models:{model}", "--input", "5")
        assert result.exit_code == 0, result.output
        assert f"free fraction: {free}.00%" in result.stdout


def test_explain_one_and_two_dimensions(work):
    one = invoke("explain", "0.weight", 0, *MODEL)
    assert one.exit_code == 0, one.output
    assert one.stdout.strip()
    two = invoke("explain", "0.weight", 0, "2.weight", 1, *MODEL)
    assert two.exit_code == 0, two.output
    assert "linear" in two.stdout


def test_fuse_writes_a_whole_folder(work):
    result = invoke("fuse", "a.pt", "b.pt", *MODEL, "--out", "fused")
    assert result.exit_code == 0, result.output
    written = work / "fused"
    expected = ["fused.safetensors", "graph.json", "plan.json", "recipe.yaml", "summary.md"]
    assert listing(written) == expected
    mlp().load_state_dict(read_state_dict(written / "fused.safetensors"), strict=True)
    fxfuse.FusionPlan.from_json((written / "plan.json").read_text())
    summary = (written / "summary.md").read_text()
    assert summary.startswith("#")
    assert "| permutation |" in summary
    assert not [name for name in listing(work) if "partial" in name]


def test_fuse_equals_the_python_interface(work):
    assert invoke("fuse", "a.pt", "b.pt", *MODEL, "--out", "fused").exit_code == 0
    members = []
    for name in ("a.pt", "b.pt"):
        members.append(mlp())
        members[-1].load_state_dict(read_state_dict(name))
    expected = fxfuse.fuse(members, make_inputs("5")).state_dict()
    for name, value in read_state_dict("fused/fused.safetensors").items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)


def test_weights_are_chosen_as_in_python(work):
    """Of checkpoints with a moving average; what was read is said on stderr."""
    members = [mlp() for _ in range(2)]
    for number, member in enumerate(members):
        average = {f"module.{name}": tensor for name, tensor in member.state_dict().items()}
        content = {"model": mlp().state_dict(), "model_ema": average, "optimizer": {}}
        torch.save(content, f"{number}.ckpt")
    expected = fxfuse.fuse(members, make_inputs("5")).state_dict()
    chosen = ["0.ckpt", "1.ckpt", *MODEL, "--weights", "ema"]
    code, out, err = Child(run_fxfuse, "fuse", *chosen, "--out", "fused", cwd=work).ended()
    assert code == 0, err
    assert "0.ckpt: weights under 'model_ema'; names without 'module.'" in err
    assert "0.ckpt" not in out
    for name, value in read_state_dict("fused/fused.safetensors").items():
        assert torch.equal(value, expected[name])
    recipe = invoke("run", "fused/recipe.yaml", "--force")
    assert recipe.exit_code == 0, recipe.output
    assert "weights: ema" in (work / "fused" / "recipe.yaml").read_text()
    pruned = invoke("prune", "0.ckpt", *MODEL, "--weights", "ema", "--width", "0.5", "--out", "p")
    assert pruned.exit_code == 0, pruned.output
    assert invoke("stack", *chosen, "--out", "stacked").exit_code == 0
    state = read_state_dict("stacked/fused.safetensors")
    assert any(torch.equal(t[0], members[0][0].weight) for t in state.values() if t.dim() == 3)
    assert invoke("verify", *chosen).exit_code == 0
    message = refused(work, "fuse", *chosen[:-1], "swa", "--out", "other")
    assert "'swa'" in message
    assert "--weights" in message


def test_fuse_json_is_all_that_stdout_holds(work):
    result = invoke("fuse", "a.pt", "b.pt", *MODEL, "--out", "fused", "--json")
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    assert content["out"] == "fused"
    assert content["verification"]
    assert all(check["passed"] for check in content["verification"])


def test_fuse_with_calibration_inputs(work):
    torch.save(torch.randn(200, 5), "inputs.pt")
    arguments = ("fuse", "a.pt", "b.pt", *MODEL, "--calibration", "inputs.pt")
    result = invoke(*arguments, "--out", "whole", "--match-steps", "3", "--json")
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    named = {candidate["name"] for candidate in content["history"]["candidates"]}
    assert named >= {"member 0", "refitted"}
    assert not content["raw"]
    plan = fxfuse.FusionPlan.from_json((work / "whole" / "plan.json").read_text())
    assert plan.options["score"] == "obs"
    summary = (work / "whole" / "summary.md").read_text()
    assert "is returned" in summary
    assert "raw transplant" not in summary
    values = ("--score", "l1", "--refine", "refit", "--task", "regression")
    result = invoke(*arguments, "--out", "values", *values)
    assert result.exit_code == 0, result.output
    # Three tenths of the inputs judge.
    assert "2 layers fitted on 140 inputs, median error" in result.stdout
    plan = fxfuse.FusionPlan.from_json((work / "values" / "plan.json").read_text())
    assert plan.options["score"] == "l1"
    raw = ("fuse", "a.pt", "b.pt", *MODEL, "--out", "x")
    assert "pass --calibration ..., 100" in refused(work, *raw, "--refine", "refit")
    for bad, message in (
        (("--method", "average", "--reference", "best"), "--reference 'best' cannot be read"),
        (("--reference", "1"), "method 'transplant' has no --reference"),
        (("--refine", "polish"), "unknown --refine 'polish'"),
        (("--refine", "match,refit"), "in this order"),
        (("--match-steps", "3", "--refine", "refit"), "--refine does not name match"),
        (("--match-steps", "3", "--match-seconds", "1"), "--match-steps and --match-seconds"),
        (("--match-steps", "3", "--refine", "none"), "--refine does not name match"),
        (("--task", "translation"), "unknown --task"),
    ):
        assert message in refused(work, *raw, *bad)


def test_a_raw_transplant_is_said_to_be_one(work):
    """On the command line, in the summary and in the report; and what to do next."""
    raw = "This is a raw transplant, most likely at chance level"
    arguments = ("fuse", "a.pt", "b.pt", *MODEL, "--report", "--out")
    result = invoke(*arguments, "fused")
    assert raw in result.stdout
    torch.save(torch.randn(200, 5), "inputs.pt")
    (command,) = re.findall(r"next: fxfuse (.*), or --calibration", result.stdout)
    command = command.replace("DATA", "inputs.pt").replace("FOLDER", "refitted")
    for name in ("summary.md", "report.html"):
        assert raw in (work / "fused" / name).read_text()
    assert re.search(
        r"distance from the ensemble on 2 example inputs \(random numbers\): [\d.e-]+ ",
        result.stdout,
    )
    told = json.loads(invoke(*arguments, "more", "--json").stdout)
    assert told["raw"]
    assert min(told["likeness"]["distance"], told["likeness"]["closest_member_distance"]) > 0
    assert 0 <= told["likeness"]["agreement_percent"] <= 100
    result = invoke(*command.split(), "--match-steps", "3")
    assert result.exit_code == 0, result.output
    assert "raw" not in result.stdout
    # What was fitted stays so, where a report is written later.
    assert invoke("report", "refitted", "--trust").exit_code == 0
    for name in ("summary.md", "report.html"):
        assert raw not in (work / "refitted" / name).read_text()
    assert "raw" not in invoke(*arguments, "whole", "--width", "2").stdout


def test_prune_one_network(work):
    torch.save(torch.randn(200, 5), "inputs.pt")
    prune = ("prune", "a.pt", *MODEL, "--out", "small")
    result = invoke(*prune, "--width", "0.5", "--calibration", "inputs.pt", "--match-steps", "3")
    assert result.exit_code == 0, result.output
    assert "One network, pruned, written to small" in result.stdout
    assert read_state_dict("small/fused.safetensors")["0.weight"].shape == (4, 5)
    assert invoke("run", "small", "--trust", "--out", "again").exit_code == 0
    for name in ("fused.safetensors", "plan.json"):
        assert (work / "small" / name).read_bytes() == (work / "again" / name).read_bytes()
    result = invoke(*prune, "--force", "--max-params", "50", "--freeze", "2.bias")
    assert result.exit_code == 0, result.output
    assert "not refitted" in result.stdout
    own = ("--calibration", "inputs.pt", "--out", "refitted")
    result = invoke("refit", "small", "--trust", *own)
    assert result.exit_code == 0, result.output
    result = invoke("compare", "refitted", "--trust", "--data", "inputs.pt")
    assert result.exit_code == 0, result.output
    assert "ensemble of" not in result.stdout
    assert invoke("report", "refitted", "--trust").exit_code == 0
    assert "pass --width 0.5" in refused(work, "prune", "a.pt", *MODEL, "--out", "x")


def test_constraints_are_flags_of_every_analysis(work):
    explained = ("explain", "0.weight", 0, *MODEL)
    assert "--freeze" not in invoke(*explained).stdout
    assert "freeze=2.weight" in invoke(*explained, "--freeze", "2.weight").stdout
    result = invoke("verify", "a.pt", "b.pt", *MODEL, "--ignore", "0")
    assert result.exit_code == 0, result.output
    assert "--share 9.* matches nothing" in refused(work, "verify", *MODEL, "--share", "9.*")


def test_fuse_to_another_width(work):
    def shapes(*options):
        result = invoke("fuse", "a.pt", "b.pt", *MODEL, "--out", "w", "--force", "--json", *options)
        assert result.exit_code == 0, result.output
        state = read_state_dict("w/fused.safetensors")
        assert json.loads(result.stdout)["sizes"] == {"0.weight:0": len(state["0.bias"])}
        return {name: tuple(tensor.shape) for name, tensor in state.items()}

    expected = {name: tuple(tensor.shape) for name, tensor in mlp(width=12).state_dict().items()}
    assert shapes("--width", "1.5") == expected
    assert shapes("--width", "0.*=1.5") == expected
    assert shapes("--width", "1.3", "--multiple-of", "4") == expected
    assert shapes("--max-params", "111") == expected
    assert shapes("--max-params", "119") == expected
    assert shapes("--max-flops", "5000")["0.weight"] == (16, 5)
    assert shapes("--width", "2", "--mixing", "joint")["0.weight"] == (16, 5)


def test_fuse_with_a_share_for_a_group_and_widths_by_group(work):
    share = ("--width", "0.5", "--allocation", "auto", "--fraction", "0.*=0.5", "--out", "share")
    result = invoke("fuse", "a.pt", "b.pt", *MODEL, *share)
    assert result.exit_code == 0, result.output
    plan = fxfuse.FusionPlan.from_json((work / "share" / "plan.json").read_text())
    assert (plan.options["allocation"], plan.options["fraction"]) == ("auto", "{'0.*': 0.5}")
    assert (plan.map_of("0.weight:0").member == 1).sum() == 2
    for share, message in (
        ("half", "--fraction 'half'"),
        ("1.5", "--fraction must be in [0, 1], got 1.5"),
    ):
        arguments = ("fuse", "a.pt", "b.pt", *MODEL, "--fraction", share, "--out", "x")
        assert message in refused(work, *arguments)


def test_fuse_applies_a_plan_again(work):
    first = ("fuse", "a.pt", "b.pt", *MODEL, "--width", "0.5", "--out", "first")
    assert invoke(*first).exit_code == 0
    again = ("fuse", "a.pt", "b.pt", *MODEL, "--plan", "first/plan.json", "--out", "again")
    result = invoke(*again)
    assert result.exit_code == 0, result.output
    for name in ("fused.safetensors", "plan.json"):
        assert (work / "first" / name).read_bytes() == (work / "again" / name).read_bytes()
    new = ("--out", "new", "--plan", "first/plan.json", *MODEL)
    twice = refused(work, "fuse", "a.pt", "b.pt", *new, "--width", "0.5", "--method", "zip")
    assert "--plan and --method, --width contradict each other" in twice
    assert "the plan's member 1" in refused(work, "fuse", "b.pt", "a.pt", *new)
    (work / "first" / "plan.json").write_bytes(b"\xff\xfe plan")
    assert "not a fusion plan" in refused(work, "fuse", "a.pt", "b.pt", *new)
    assert "missing.json" in refused(work, "fuse", "a.pt", "b.pt", *new, "--plan", "missing.json")


def test_fuse_networks_that_know_different_classes(work):
    torch.save(mlp(classes=2).state_dict(), "c.pt")
    networks = ("fuse", "a.pt", "c.pt", *MODEL, "--member-arg", "1:classes=2", "--json")
    names = [["cat", "dog", "fish"], ["dog", "bird"]]
    (work / "classes.json").write_text(json.dumps(names))
    union = ("--head-output", "union", "--classes", "classes.json")
    result = invoke(*networks, *union, "--out", "union")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["classes"] == ["cat", "dog", "fish", "bird"]
    assert read_state_dict("union/fused.safetensors")["heads.1.2.weight"].shape == (2, 8)
    side = ("--heads", "2", "--head-output", "concat")
    assert invoke(*networks, *side, "--out", "side").exit_code == 0
    plan = fxfuse.FusionPlan.from_json((work / "side" / "plan.json").read_text())
    assert plan.heads.output == "concat"
    for text, message in (('[["cat"]]', "got 1"), ("{}", "holds a dict"), ("[", "Expecting")):
        (work / "classes.json").write_text(text)
        assert message in refused(work, *networks, *union, "--out", "x")
    wrong = ("fuse", "a.pt", "c.pt", *MODEL, "--member-arg", "2:classes=2", "--out", "x")
    assert "one of the 2 networks" in refused(work, *wrong)


def test_fuse_without_verification(work):
    result = invoke("fuse", "a.pt", "b.pt", *MODEL, "--out", "fused", "--json", "--no-verify")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["verification"] == []
    assert "Skipped" in (work / "fused" / "summary.md").read_text()


def test_fuse_keeps_the_dtype_of_the_checkpoints(work):
    for name in ("a.pt", "b.pt"):
        torch.save(mlp().double().state_dict(), name)
    result = invoke("fuse", "a.pt", "b.pt", *MODEL, "--out", "fused")
    assert result.exit_code == 0, result.output
    state = read_state_dict("fused/fused.safetensors")
    assert {value.dtype for value in state.values()} == {torch.float64}


def test_force_replaces_an_earlier_result(work):
    arguments = ("fuse", "a.pt", "b.pt", *MODEL, "--out", "fused")
    assert invoke(*arguments).exit_code == 0
    before = (work / "fused" / "fused.safetensors").read_bytes()
    torch.save(mlp().state_dict(), "a.pt")
    assert "--force" in refused(work, *arguments)
    assert (work / "fused" / "fused.safetensors").read_bytes() == before
    assert invoke(*arguments, "--force").exit_code == 0
    assert (work / "fused" / "fused.safetensors").read_bytes() != before


def test_verify_one_network_and_an_ensemble(work):
    one = invoke("verify", *MODEL, "--json")
    assert one.exit_code == 0, one.output
    assert len(json.loads(one.stdout)) == 1
    two = invoke("verify", "a.pt", "b.pt", *MODEL, "--json")
    assert two.exit_code == 0, two.output
    assert len(json.loads(two.stdout)) == 2
    assert all(check["passed"] for check in json.loads(two.stdout))


def test_verify_exits_1_when_an_oracle_fails(work, monkeypatch):
    from fxfuse.cli.commands.verify import oracles

    failed = oracles.Check("permutation", 1.0, 1e-9, False, "group 0")
    monkeypatch.setattr(oracles, "permutation", lambda *_, **__: failed)
    result = invoke("verify", *MODEL)
    assert result.exit_code == 1
    assert "FAILED" in result.stdout
    assert "group 0" in result.stdout


def test_without_a_command_the_overview_is_printed():
    result = invoke()
    assert result.exit_code == 0
    assert result.output == invoke("--help").output


def test_help_needs_no_torch():
    """It takes a second to import, and the overview is asked for often."""
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from fxfuse.cli.app import app\n"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0\n"
        "print(sorted({'torch', 'numpy', 'scipy', 'networkx'} & sys.modules.keys()))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_overview_says_what_the_commands_say():
    for name, summary in COMMANDS.items():
        function = getattr(importlib.import_module(f"fxfuse.cli.commands.{name}"), name)
        assert function.__doc__.split("\n")[0] == summary
        assert summary.split()[0] in invoke("--help").stdout


def test_the_package_shows_its_public_names_only():
    code = (
        "import fxfuse\n"
        "import fxfuse.api.fuse, fxfuse.ensemble, fxfuse.runtime\n"
        "assert callable(fxfuse.fuse) and callable(fxfuse.stack) and callable(fxfuse.compile)\n"
        "assert fxfuse.fuse is fxfuse.api.fuse.fuse and fxfuse.refine.match\n"
        "extra = {'__version__', 'errors', 'refine', 'verify'}\n"
        "assert set(dir(fxfuse)) == extra | set(fxfuse.__all__)\n"
        "try:\n"
        "    fxfuse.nothing\n"
        "except AttributeError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "module 'fxfuse' has no attribute 'nothing'"


def test_a_report_is_written_where_it_is_asked_for(work):
    arguments = ("fuse", "a.pt", "b.pt", *MODEL, "--out", "told", "--report", "--json")
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["files"][-1] == "report.html"
    assert "2 networks fused into one" in (work / "told" / "report.html").read_text()
    # A folder with a report is a folder of ours.
    assert invoke(*arguments, "--force").exit_code == 0


# --- bad input ---

FUSE = ("fuse", "a.pt", "b.pt", "--out", "new/fused")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fuse", "a.pt", "--out", "new/fused", *MODEL), "at least"),
        ((*FUSE, *MODEL, "--method", "alchemy"), "unknown --method 'alchemy'"),
        ((*FUSE, *MODEL, "--score", "vibes"), "unknown --score 'vibes'"),
        ((*FUSE, *MODEL, "--variant", "sideways"), "unknown --variant 'sideways'"),
        ((*FUSE, *MODEL, "--width", "3"), "--width must be in (0, 2], got 3"),
        ((*FUSE, *MODEL, "--width", "0"), "--width must be in (0, 2], got 0"),
        ((*FUSE, *MODEL, "--width", "nan"), "--width must be in (0, 2], got nan"),
        ((*FUSE, *MODEL, "--width", "wide"), "cannot be read"),
        ((*FUSE, *MODEL, "--width", "0.*="), "cannot be read"),
        ((*FUSE, *MODEL, "--width", "0.5", "--width", "1.5"), "contradicts another --width"),
        ((*FUSE, *MODEL, "--width", "0.*=1", "--width", "2"), "contradicts another --width"),
        ((*FUSE, *MODEL, "--width", "9.*=1.5"), "matches nothing"),
        ((*FUSE, *MODEL, "--width", "0.5", "--method", "average"), "member's width only"),
        ((*FUSE, *MODEL, "--width", "0.5", "--max-params", "100"), "width and a budget contradict"),
        ((*FUSE, *MODEL, "--max-params", "5"), "smallest network has"),
        ((*FUSE, *MODEL, "--max-flops", "1"), "smallest network takes"),
        ((*FUSE, *MODEL, "--max-params", "many"), "--max-params"),
        ((*FUSE, *MODEL, "--width", "0.5", "--multiple-of", "0"), "--multiple-of must be"),
        (
            (*FUSE, *MODEL, "--width", "0.5", "--mixing", "per_member"),
            "--mixing per_member does not work here",
        ),
        ((*FUSE, *MODEL, "--mixing", "sometimes"), "use one of joint, per_member"),
        ((*FUSE, *MODEL, "--allocation", "auto"), "--allocation auto needs a size"),
        ((*FUSE, *MODEL, "--base-member", "2"), "pass --base-member with the number"),
        ((*FUSE, *MODEL, "--head-output", "union"), "--head-output 'union' needs --classes"),
        ((*FUSE, *MODEL, "--model-arg", "width=9"), "does not fit"),
        ((*FUSE, *MODEL, "--model-arg", "height=9"), "cannot be called"),
        ((*FUSE, *MODEL, "--model-arg", "width"), "key=value"),
        ((*FUSE, "--model", "cli_models:mlp", "--input", "6"), "example inputs"),
        ((*FUSE, "--model", "cli_models:mlp", "--input", "5,0"), "size 0"),
        ((*FUSE, "--model", "cli_models:mlp", "--input", "5x5"), "neither a shape"),
        ((*FUSE, "--model", "cli_models", "--input", "5"), "module:factory"),
        ((*FUSE, "--model", "cli_models:nothing", "--input", "5"), "cannot be imported"),
        ((*FUSE, "--model", "no_such_module:x", "--input", "5"), "cannot be imported"),
        ((*FUSE, "--model", "cli_models:broken", "--input", "5"), "broken on purpose"),
        ((*FUSE, "--model", "cli_models:number", "--input", "5"), "not a torch.nn.Module"),
        ((*FUSE, "--model", "cli_models:value", "--input", "5"), "cannot be called"),
        (("analyze", "--model", "cli_models:sparse", "--input", "5"), "not dense"),
        (
            ("analyze", "--model", "cli_models:packed", "--input", "5"),
            "weights that are not tensors",
        ),
        (("analyze", "--model", "cli_models:ReturnsNone", "--input", "5"), "returns no tensor"),
        (("analyze", "--model", "cli_models:mlp", "--input", "nan.pt"), "an example input is NaN"),
        (("analyze", "--model", "cli_models:mlp", "--input", "double.pt"), ".to(torch.float32)"),
        (("analyze", "--model", "cli_models:mlp", "--input", "empty.pt"), "is empty"),
        (("verify", "--model", "cli_models:meta", "--input", "5"), "no weights"),
        (("explain", "no.weight", 0, *MODEL), "no.weight"),
        (("explain", "0.weight", 7, *MODEL), "7"),
        (("explain", "0.weight", 0, "2.weight", *MODEL), "dimension of 2.weight is missing"),
        (("analyze", "--model", "cli_models:Opaque", "--input", "5"), "finds no tensor"),
        (("analyze", "--model", "cli_models:mlp"), "--input"),
        (("analyze", *MODEL, "--no-such-option"), "No such option"),
        (("fuse", *MODEL, "--out", "new/fused"), "CHECKPOINT"),
        (("verify", "missing.pt", *MODEL), "missing.pt"),
        (("demo", "--json", "no/folder/out.json"), "no folder"),
        (("demo", "--seeds", "0"), "--seeds"),
        (("transmogrify",), "No such command"),
    ],
)
def test_bad_arguments(work, arguments, message):
    assert message in refused(work, *arguments)


def test_different_dtypes(work):
    torch.save(mlp().double().state_dict(), "b.pt")
    refused(work, *FUSE, *MODEL)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weights(work, value):
    state = mlp().state_dict()
    state["2.weight"][0, 0] = value
    torch.save(state, "b.pt")
    assert "2.weight" in refused(work, *FUSE, *MODEL)


def test_nothing_to_fuse(work):
    for name in ("a.pt", "b.pt"):
        torch.save(nn.Linear(5, 3).state_dict(), name)
    linear = ("--model", "torch.nn:Linear", "--input", "5")
    refused(work, *FUSE, *linear, "--model-arg", "in_features=5", "--model-arg", "out_features=3")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_missing_and_damaged_checkpoints(work, suffix):
    bad = f"bad{suffix}"
    arguments = ("fuse", "a.pt", bad, "--out", "new/fused", *MODEL)
    assert "cannot open" in refused(work, *arguments)
    (work / bad).write_bytes((work / "b.pt").read_bytes()[:300])
    assert "damaged" in refused(work, *arguments)


def test_pickle_bearing_checkpoint(work):
    torch.save(mlp(), "b.pt")
    assert "pickled" in refused(work, *FUSE, *MODEL)


def test_checkpoint_of_another_network(work):
    torch.save(nn.Conv2d(3, 4, 3).state_dict(), "b.pt")
    assert "does not fit" in refused(work, *FUSE, *MODEL)


def test_force_does_not_delete_what_is_not_ours(work):
    (work / "new" / "fused").mkdir(parents=True)
    (work / "new" / "fused" / "thesis.tex").write_text("years of work")
    assert "thesis.tex" in refused(work, *FUSE, *MODEL, "--force")


def test_a_folder_that_cannot_be_written(work):
    (work / "new").write_text("a file where a folder is needed")
    refused(work, *FUSE, *MODEL)


def test_an_existing_folder_is_refused_before_any_work(work, monkeypatch):
    (work / "new" / "fused").mkdir(parents=True)
    running = sys.modules["fxfuse.cli.recipe.run"]
    monkeypatch.setattr(running, "fuse", lambda *_, **__: pytest.fail("too late"))
    assert "exists already" in refused(work, *FUSE, *MODEL)


# --- faults of our own ---


def test_an_unexpected_error_shows_no_traceback(work, monkeypatch):
    def fail(*_, **__):
        raise ZeroDivisionError("a bug\nwith details")

    monkeypatch.setattr(fxfuse, "analyze", fail)
    result = invoke("analyze", *MODEL)
    assert result.exit_code == 70
    assert "ZeroDivisionError: a bug" in result.stderr
    assert "FXFUSE_DEBUG=1" in result.stderr
    assert "Traceback" not in result.output

    monkeypatch.setenv("FXFUSE_DEBUG", "1")
    assert isinstance(invoke("analyze", *MODEL).exception, ZeroDivisionError)


def test_an_error_while_writing_leaves_nothing(work, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fxfuse.api.saved.write_state_dict", fail)
    assert "No space left" in refused(work, *FUSE, *MODEL)


# --- the real process ---


def test_bad_input_in_a_process_of_its_own(work):
    before = listing(work)
    command = [sys.executable, "-m", "fxfuse", "fuse", "a.pt", "missing.pt", *FUSE[3:], *MODEL]
    environment = os.environ | {"PYTHONPATH": str(Path(fxfuse.__file__).parents[1])}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, env=environment
    )
    assert done.returncode == 2
    assert done.stdout == ""
    # Without a terminal, a line says what was being done.
    assert done.stderr.startswith("reading networks and data ...\n")
    assert "\nerror: cannot open the checkpoint missing.pt\n" in done.stderr
    assert "Traceback" not in done.stderr
    assert listing(work) == before


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["ctrl-c", "kill"]
)
def test_interrupted(work, number, status):
    process = Child(run_fxfuse, "analyze", "--model", "cli_models:Slow", "--input", "5", cwd=work)
    assert process.first_line() == "started"
    process.send_signal(number)
    found, _, error = process.ended()
    assert found == status
    assert "Traceback" not in error


# --- parsing ---


def test_model_arguments_are_literals_or_text():
    pairs = ["a=10", "b=None", "c=True", "d=(1, 2)", "e=gelu", "f='x'", "g=a=b", "h="]
    assert parse_model_args(pairs) == {
        "a": 10,
        "b": None,
        "c": True,
        "d": (1, 2),
        "e": "gelu",
        "f": "x",
        "g": "a=b",
        "h": "",
    }


@pytest.mark.parametrize("pair", ["a", "=1", "1a=2", "a b=1"])
def test_malformed_model_arguments(pair):
    with pytest.raises(OptionError, match="key=value"):
        parse_model_args([pair])


def test_model_arguments_are_never_evaluated(tmp_path):
    trace = tmp_path / "trace"
    expression = f"__import__('os').mkdir({str(trace)!r})"
    assert parse_model_args([f"a={expression}"]) == {"a": expression}
    assert not trace.exists()


def test_made_models_are_in_eval_mode():
    assert not make_model("torch.nn:Dropout", {}).training


def test_inputs_from_a_shape_are_always_the_same():
    (first,) = make_inputs("3, 8,8")
    (second,) = make_inputs("3,8,8")
    assert first.shape == (2, 3, 8, 8)
    assert first.dtype == torch.float32
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert make_inputs("5", torch.bfloat16)[0].dtype == torch.bfloat16


def test_inputs_from_files(tmp_path):
    x, y = torch.ones(2, 3), torch.zeros(2, dtype=torch.int64)
    for content, count in ((x, 1), ((x, y), 2), ([x], 1), ({"x": x}, 1)):
        torch.save(content, tmp_path / "in.pt")
        inputs = make_inputs(str(tmp_path / "in.pt"))
        assert len(inputs) == count
        torch.testing.assert_close(inputs[0], x)


@pytest.mark.parametrize("content", [{}, [], {"x": torch.ones(1), "y": torch.ones(1)}, [1], "text"])
def test_input_files_that_hold_no_inputs(tmp_path, content):
    torch.save(content, tmp_path / "in.pt")
    with pytest.raises(InputError, match="neither one tensor"):
        make_inputs(str(tmp_path / "in.pt"))
