"""The paper's experiments: each runs on a tiny data set, and what it writes has a meaning."""

from __future__ import annotations

import copy
import dataclasses
import importlib.metadata
import json
import math

import pytest
import torch
from torch import nn

from benchmarks.pages import marks, with_tables
from benchmarks.paper import cost, depth, refining, runner, sparsity, sync_sgd, table, width
from benchmarks.paper.datasets import Data
from benchmarks.paper.experiment import Experiment, Job, Options, Place, Row, run, summary
from benchmarks.paper.markdown import markdown
from benchmarks.paper.order import PruneFirst
from benchmarks.paper.plot import draw
from benchmarks.paper.refining import controls, finetuned
from fxfuse import fuse

TINY = Options(seeds=1, steps=8, rates=(1e-3,), calibration=24, batch=8, member_steps=4)
NAMES = [experiment.name for experiment in table.EXPERIMENTS]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cost, "WIDTHS", (0.5,))
    monkeypatch.setattr(sync_sgd, "PARTS", (2, 4))
    monkeypatch.setattr(width, "WIDTHS", (0.25, 0.5))
    monkeypatch.setattr(depth, "DEPTHS", (1, 2))
    monkeypatch.setattr(sparsity, "SPARSITIES", (0.5, 0.99))


@pytest.fixture(scope="module")
def data():
    labels = torch.arange(4).repeat(30)
    inputs = torch.randn(120, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    return Data("noise", inputs + labels.reshape(-1, 1, 1, 1), labels)


def of(name: str) -> Experiment:
    return next(experiment for experiment in table.EXPERIMENTS if experiment.name == name)


def cells(block):
    return {(cell["row"], cell["column"]) for cell in block["rows"]}


EXPECTED = {
    "compare": {
        ("average", "0 steps"),
        ("optimal transport", "8 steps"),
        ("NT (obs) + refit", "0 steps"),
        ("auto, 8 matching steps first", "8 steps"),
        ("best member, distilled", "8 steps"),
    },
    "members": {
        ("2", "joint, 0 steps"),
        ("3", "hierarchical, 8 steps"),
        ("3", "ensemble, 0 steps"),
    },
    "order": {
        ("prune, merge, fine-tune", "8 steps"),
        ("merge and prune one by one, fine-tune in between", "8 steps"),
        ("fine-tune members, merge, prune, fine-tune: half each", "8 steps"),
    },
    "fraction": {("0", "0 steps"), ("0.3", "8 steps"), ("1", "8 steps")},
    "selftransplant": {
        ("with itself", "0 steps"),
        ("with another member, half of each", "8 steps"),
    },
    "sync_sgd": {
        ("2", "transplantation, one start"),
        ("4", "averaging, own starts"),
        ("no exchange, own starts", "8 steps"),
    },
    "width": {
        ("0.25", "NT (l2), 0 steps"),
        ("0.5", "NT (obs) + refit, 8 steps"),
    },
    "depth": {("1", "NT (l2), 8 steps"), ("2", "NT (obs) + refit, 0 steps")},
    "different": {
        ("0.5", "NT (l2), 0 steps"),
        ("1", "untrained network, 8 steps"),
        ("1.5", "NT (l2), 8 steps"),
    },
    "sparsity": {
        ("0.5", "NT (l2), global, 0 steps"),
        ("0.99", "NT (obs) + refit, 8 steps"),
    },
    "capacity": {
        ("small members side by side", "8 steps"),
        ("one large network, pruned (obs) to a small one", "0 steps"),
    },
    "cost": {("0.5", "NT (l2)"), ("0.5", "8 training steps")},
}
EXPECTED["vit"] = EXPECTED["resnet"] = EXPECTED["compare"]


#: Experiments whose lines are no networks: every line has the controls as columns.
SWEPT = {"members": ("2", "3"), "width": ("0.25", "0.5"), "depth": ("1", "2")}


@pytest.mark.filterwarnings("ignore:.*calibration inputs are few")
@pytest.mark.parametrize("name", NAMES)
def test_experiment(name, data, tmp_path):
    experiment = of(name)
    ns = {"members": (2, 3), "order": (3,)}.get(name, (2,))
    told = []
    blocks = run(experiment, [Place("mlp", data, "same data")], ns, TINY, told.append)
    assert len(told) == len(ns)
    assert len(blocks) == 1
    assert cells(blocks[0]) >= EXPECTED[name]
    if name != "cost":
        wanted = {("ensemble", "0 steps")} | {
            (control, f"{k} steps")
            for control in ("best member", "best member, head refit")
            for k in (0, 8)
        }
        if name in SWEPT:
            wanted = {(at, f"{row}, {column}") for at in SWEPT[name] for row, column in wanted}
        assert cells(blocks[0]) >= wanted
    results = json.loads(json.dumps(runner.document(experiment, blocks, TINY, 1.0)))
    for cell in results["blocks"][0]["rows"]:
        for measure in experiment.measures:
            spread = cell["values"][measure]
            assert spread["seeds"] == [spread["mean"]]
            assert 0 <= spread["min"] == spread["max"] <= (100 if measure == "accuracy" else 1e4)
    written = markdown(experiment, results)
    lines = [line for line in written.splitlines() if line.startswith("| ")]
    rows = len({cell["row"] for cell in blocks[0]["rows"]})
    assert len(lines) == len(experiment.measures) * (1 + rows)
    assert len({line.count("|") for line in written.splitlines() if line.startswith("|")}) == 1
    plot = tmp_path / "plots" / f"{name}.svg"
    draw(experiment, results, plot)
    first = plot.read_text()
    assert experiment.line in first or name in (
        "compare",
        "vit",
        "resnet",
        "order",
        "selftransplant",
        "capacity",
    )
    draw(experiment, results, plot)
    assert plot.read_text() == first


@pytest.fixture
def measured(data, tmp_path, monkeypatch, capsys):
    """A run of the controls: the folders of its JSON and its plot, and what it printed."""
    monkeypatch.setattr(runner, "load", lambda name, root: dataclasses.replace(data, name=name))
    fewer = dataclasses.replace(of("fraction"), measure=controls)
    out = tmp_path / "results" / "fraction.json"
    plot = tmp_path / "plots" / "fraction.svg"
    arguments = [
        "--seeds",
        "2",
        "--network",
        "mlp",
        "--setting",
        "specialists",
        "--steps",
        "3",
        "--member-steps",
        "3",
    ]
    runner.command(fewer, [*arguments, "--json", str(out), "--plot", str(plot)])
    return out.parent, plot.parent, capsys.readouterr().out


def test_command(measured):
    results, plots, printed = measured
    found = json.loads((results / "fraction.json").read_text())
    assert found["schema"] == 1
    assert found["experiment"] == "fraction"
    assert found["options"]["seeds"] == 2
    assert found["options"]["steps"] == 3
    assert found["versions"]["torch"] == importlib.metadata.version("torch")
    (block,) = found["blocks"]
    assert {key: block[key] for key in ("network", "data", "setting", "n")} == {
        "network": "mlp",
        "data": "mnist5k",
        "setting": "specialists",
        "n": 2,
    }
    assert len(block["rows"][0]["values"]["accuracy"]["seeds"]) == 2
    assert "| best member |" in printed
    assert (plots / "fraction.svg").exists()


def test_pages(measured, capsys):
    results, plots, _ = measured
    page = plots / "fraction.md"
    begin, end = marks(table.MARK)
    page.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    where = ["--pages", str(plots), "--results", str(results)]
    assert table.main([*where, "--check"]) == 1
    assert "fraction.md is out of date" in capsys.readouterr().err
    assert "old" in page.read_text()
    assert not (plots / "order.md").exists()
    assert table.main(where) == 0
    assert table.main([*where, "--check"]) == 0
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "| best member |" in text
    assert "](fraction.svg)" in text
    assert "`python -m benchmarks.paper.fraction --network mlp`; 2 seeds" in text
    pages = {name: (plots / f"{name}.md").read_text() for name in NAMES}
    assert [name for name in NAMES if "Not measured yet" not in pages[name]] == ["fraction"]
    assert pages["order"].startswith("# Order of")
    (results / "fraction.json").unlink()
    assert table.main([*where, "--check"]) == 1


def test_the_page_needs_its_marks():
    with pytest.raises(ValueError, match=marks(table.MARK)[0]):
        with_tables("nothing", table.MARK, "tables")


def test_a_summary_spans_the_seeds():
    runs = [[Row("a", "b", {"accuracy": value})] for value in (1.0, 4.0, 2.5)]
    (cell,) = summary(runs)
    wanted = {"mean": 2.5, "min": 1.0, "max": 4.0, "seeds": [1.0, 4.0, 2.5]}
    assert cell == {"row": "a", "column": "b", "x": None, "values": {"accuracy": wanted}}


def test_a_summary_refuses_cells_that_do_not_correspond():
    row, other = Row("a", "b", {"accuracy": 1.0}), Row("a", "c", {"accuracy": 1.0})
    with pytest.raises(ValueError, match="same cells"):
        summary([[row], [other]])
    with pytest.raises(ValueError, match="same cells"):
        summary([[row, row]])


def test_validation_chooses_and_the_start_stays_as_it_is(data):
    options = dataclasses.replace(TINY, rates=(1e-9, 3e-2), steps=40)
    job = Job("mlp", data, "same data", 2, 0, options)
    start = job.case.fresh(7).eval()
    before = copy.deepcopy(start.state_dict())
    refined = finetuned(job, start)
    assert refined.rate >= 3e-2
    for name, tensor in start.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("best", [0.027, 0.1, 0.3, 1.0, 8.1])
def test_a_rate_at_the_end_of_the_range_widens_it(data, best: float, monkeypatch):
    job = Job("mlp", data, "same data", 2, 0, dataclasses.replace(TINY, rates=(0.1, 0.3)))
    monkeypatch.setattr(refining, "merit", lambda _, module: -abs(math.log(module.rate / best)))

    def candidate(rate: float) -> nn.Module:
        module = nn.Identity()
        module.rate = rate
        tried.append(rate)
        return module

    tried: list[float] = []
    found = refining.chosen(job, candidate).rate
    assert abs(math.log(found / best)) < math.log(3.0) / 2
    assert min(tried) < found < max(tried)


def test_pruning_first_takes_the_same_share_of_every_member(data):
    job = Job("mlp", data, "same data", 3, 0, TINY)
    members = list(job.case.members)
    plan = fuse(members, job.calibration[:2], method=PruneFirst()).plan
    for unit_map in plan.maps:
        counts = torch.as_tensor(unit_map.member).bincount().tolist()
        assert max(counts) - min(counts) <= 1
        assert sum(counts) == unit_map.n_units


def test_pruning_first_of_two_members_is_half_of_each(data):
    job = Job("mlp", data, "same data", 2, 0, TINY)
    mine = job.fused(method=PruneFirst()).state_dict()
    for name, tensor in job.fused(fraction=0.5).state_dict().items():
        assert torch.equal(tensor, mine[name])
