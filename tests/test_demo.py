"""The demo: a tiny run of it, its tables, and the script that puts them into the pages."""

from __future__ import annotations

import copy
import importlib.util
import io
import json
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from fxfuse.cli.app import app
from fxfuse.cli.data import mnist5k
from fxfuse.cli.demo import measure, to_markdown, to_rich
from fxfuse.cli.demo.compare import Entry
from fxfuse.cli.demo.members import average
from fxfuse.cli.demo.network import SmallResNet
from fxfuse.cli.demo.repetition import SETTINGS, Repetition
from fxfuse.cli.demo.rows import Row
from fxfuse.cli.demo.run import _repetitions
from fxfuse.cli.evaluate import Ensemble

ROWS = [
    "member 1",
    "member 2",
    "member 3",
    "member 4",
    "ensemble of 4",
    "weight averaging",
    "weight matching + recalibration",
    "NT, right after fusion",
    "NT + refit",
    "NT + refit + 4 matching steps",
    "auto, 4 matching steps",
    "best member (by validation)",
    "best member + head refit",
    "best member + 4 matching steps",
    "NT + 4 fine-tuning steps",
    "best member + 4 fine-tuning steps",
    "best member + 4 distillation steps",
]
CONTROLS = {
    "weight averaging": "best member (by validation)",
    "weight matching + recalibration": "best member (by validation)",
    "NT, right after fusion": "best member (by validation)",
    "NT + refit": "best member + head refit",
    "NT + refit + 4 matching steps": "best member + 4 matching steps",
    "auto, 4 matching steps": "best member + 4 matching steps",
    "NT + 4 fine-tuning steps": "best member + 4 fine-tuning steps",
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What a short run writes, with a process of its own for each setting."""
    file = tmp_path_factory.mktemp("demo") / "n.json"
    steps = ("--steps", "4", "--member-steps", "40", "--no-compile", "--json", str(file))
    with pytest.MonkeyPatch.context() as m:
        m.setattr(measure, "_RUN_TIME", 0.01)
        m.setattr(torch, "get_num_threads", lambda: 2)
        done = CliRunner().invoke(app, ["demo", "--seeds", "1", *steps])
    assert done.exit_code == 0, done.output
    assert "100%" in done.stderr
    numbers = json.loads(file.read_text())
    for setting in numbers["settings"]:
        assert setting["name"] in done.stdout
        for row in setting["rows"]:
            assert row["name"] in done.stdout
    return numbers


def test_one_thread_runs_the_repetitions_one_after_the_other(monkeypatch):
    """In this process; entries come in order, and each is counted."""
    entry = Entry("a", "fused", 0.5)
    monkeypatch.setattr("fxfuse.cli.demo.run.compare", lambda case, *steps: [entry, entry])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    finished: list[int] = []
    found = _repetitions([(SETTINGS[0], 0), (SETTINGS[1], 0)], 1, 1, finished.append)
    assert found == [[entry, entry]] * 2
    assert finished == [1, 2, 3, 4]


def rows_of(results, setting):
    return {row["name"]: row for row in results["settings"][setting]["rows"]}


def test_both_settings_have_every_row(results):
    names = [setting["name"] for setting in results["settings"]]
    assert names == ["same data, different seeds", "specialists"]
    for setting in results["settings"]:
        assert [row["name"] for row in setting["rows"]] == ROWS
        controls = {r["name"]: r["control"] for r in setting["rows"] if r["control"] is not None}
        assert controls == CONTROLS
        assert setting["members"] == 4


def test_numbers_agree_with_each_other(results):
    for setting in (0, 1):
        rows = rows_of(results, setting)
        member, ensemble = rows["member 1"], rows["ensemble of 4"]
        fused = rows["NT, right after fusion"]
        assert ensemble["params"] == 4 * member["params"]
        assert ensemble["flops"] == pytest.approx(4 * member["flops"], rel=0.01)
        assert (fused["params"], fused["flops"]) == (member["params"], member["flops"])
        members = [rows[f"member {i}"]["accuracy"]["mean"] for i in range(1, 5)]
        assert rows["best member (by validation)"]["accuracy"]["mean"] in members
        for row in rows.values():
            accuracy = row["accuracy"]
            assert 0 <= accuracy["min"] <= accuracy["mean"] <= accuracy["max"] <= 1
            assert len(accuracy["seeds"]) == 1
            assert row["latency_ms"]["eager"] > 0
            assert row["latency_ms"]["compiled"] is None
            added = " + " in row["name"] or "steps" in row["name"]
            assert (row["seconds"] is not None) == added
            chosen = "tuning" in row["name"] or "distillation" in row["name"]
            assert len(row["learning_rates"]) == chosen
            assert len(row["starts"]) == row["name"].startswith("auto")


def test_a_second_of_training_already_beats_guessing(results):
    for setting in (0, 1):
        rows = rows_of(results, setting)
        assert rows["ensemble of 4"]["accuracy"]["mean"] > 0.5


def test_refit_mends_what_the_transplant_broke(results):
    for setting in (0, 1):
        rows = rows_of(results, setting)
        broken, mended = (
            rows[name]["accuracy"]["mean"] for name in ("NT, right after fusion", "NT + refit")
        )
        assert mended > broken + 0.3


def test_parts_of_a_repetition_share_no_image_and_calibration_has_all_classes():
    images, labels = mnist5k()
    case = Repetition.of(SETTINGS[1], 5, images, labels)
    parts = torch.cat([case.parts.train, case.parts.val, case.parts.test])
    assert len(parts.unique()) == len(labels)
    calibration = case.calibration()
    assert torch.equal(calibration, case.calibration())
    assert len(calibration) == 1000
    train = {
        image.numpy().tobytes(): int(label)
        for image, label in zip(images[case.parts.train], labels[case.parts.train], strict=True)
    }
    classes = torch.tensor([train[image.numpy().tobytes()] for image in calibration])
    assert (classes.bincount(minlength=10) > 50).all()
    assert len(case.validation[0]) == 1000
    assert len(case.test[1]) == 1500


def test_members_of_the_specialists_see_few_images_of_other_classes():
    images, labels = mnist5k()
    batches = Repetition.of(SETTINGS[1], 0, images, labels).batches_of_member(1)
    counts = torch.cat([seen for _, seen in batches]).bincount(minlength=10)
    assert (counts[[1, 5, 9]] > 200).all()
    assert (counts[[0, 2, 3, 4, 6, 7, 8]] <= 25).all()


def test_a_row_gathers_its_seeds():
    entries = [
        Entry("a", "fused", accuracy, "b", seconds, None, start)
        for accuracy, seconds, start in ((0.5, 1.0, "fused"), (1.0, 3.0, "member 2"))
    ]
    row = Row.of(entries[0])
    for entry in entries:
        row.add(entry)
    assert row.summary({"params": 7}) == {
        "name": "a",
        "control": "b",
        "params": 7,
        "accuracy": {"mean": 0.75, "min": 0.5, "max": 1.0, "seeds": [0.5, 1.0]},
        "seconds": 2.0,
        "learning_rates": [],
        "starts": ["fused", "member 2"],
    }


def test_average_is_the_mean_with_the_first_members_counters():
    members = [SmallResNet() for _ in range(3)]
    members[0].stem[1].num_batches_tracked.fill_(7)
    mean = average(members).state_dict()
    stacked = torch.stack([member.head.weight for member in members])
    torch.testing.assert_close(mean["head.weight"], stacked.mean(dim=0))
    assert mean["stem.1.num_batches_tracked"] == 7
    assert not torch.equal(members[0].head.weight, mean["head.weight"])


def test_ensemble_answers_with_the_mean_of_the_logits():
    members = [SmallResNet().eval() for _ in range(2)]
    images = torch.rand(3, 1, 28, 28)
    expected = (members[0](images) + members[1](images)) / 2
    torch.testing.assert_close(Ensemble(members)(images), expected)


def test_small_resnet_exports_with_a_free_batch_dimension():
    network = SmallResNet().eval()
    batch = ({0: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(network, (torch.rand(2, 1, 28, 28),), dynamic_shapes=batch)
    images = torch.rand(5, 1, 28, 28)
    torch.testing.assert_close(program.module()(images), network(images))


def test_measures():
    linear = torch.nn.Linear(6, 4)
    assert measure.parameters(linear) == 28
    assert measure.flops(linear, torch.rand(8, 6)) == 2 * 6 * 4
    identity, labels = torch.nn.Identity(), torch.tensor([0, 1, 1])
    logits = torch.tensor([[9.0, 0.0], [0.0, 9.0], [9.0, 0.0]])
    accuracy, cross_entropy = measure.evaluate(identity, logits, labels)
    assert accuracy == pytest.approx(2 / 3)
    assert cross_entropy == pytest.approx(3, abs=0.01)


def test_latency_is_measured_compiled_too(monkeypatch):
    monkeypatch.setattr(measure, "_RUN_TIME", 0.01)
    assert measure.latency(torch.nn.Linear(6, 4).eval(), torch.rand(8, 6), compiled=True) > 0


def test_failing_compiler_leaves_a_note_and_no_number(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no C++ compiler\nmore")

    monkeypatch.setattr(measure, "latency", fail)
    notes = []
    assert measure.compiled_latency(torch.nn.Identity(), "fused", torch.rand(1), notes) is None
    assert notes == ["torch.compile failed on the fused network: no C++ compiler"]


def _row(name, control, mean, low, high, eager, compiled, seconds, starts=()):
    return {
        "name": name,
        "control": control,
        "params": 77754,
        "flops": 5_104_896,
        "accuracy": {"mean": mean, "min": low, "max": high, "seeds": [low, high]},
        "latency_ms": {"eager": eager, "compiled": compiled},
        "seconds": seconds,
        "learning_rates": [],
        "starts": list(starts),
    }


EXAMPLE = {
    "schema": 2,
    "environment": {"torch": "2.14", "python": "3.11", "cores": 2, "threads": 2, "cpu": "Z80"},
    "steps": 100,
    "member_steps": 150,
    "batch": 64,
    "calibration": 1000,
    "settings": [
        {
            "name": "same data",
            "members": 4,
            "rows": [
                _row("member 1", None, 0.957, 0.95, 0.9642, 1.784, None, None),
                _row("NT + 100", "member 1", 0.961, 0.9601, 0.9619, 1.9, 1.2, 0.94),
                _row("auto", "member 1", 0.957, 0.95, 0.964, 1.9, 1.2, 2, ["member 2", "fused"]),
            ],
        }
    ],
    "notes": ["torch.compile failed on [something]"],
    "seconds": 128.4,
}

MARKDOWN = """\
**Same data**

| network | test accuracy, % | params | MFLOPs | eager, ms | compiled, ms | adds, CPU s |
| --- | ---: | ---: | ---: | ---: | ---: | ---: |
| member 1 | 95.7 [95.0, 96.4] | 77,754 | 5.10 | 1.78 | – | – |
| NT + 100 | 96.1 [96.0, 96.2] | 77,754 | 5.10 | 1.90 | 1.20 | 0.9 |
| auto (start: member 1x, fused 1x) | 95.7 [95.0, 96.4] | 77,754 | 5.10 | 1.90 | 1.20 | 2.0 |

Accuracy: mean [min, max] over 2 seeds. Members were trained for 150 steps of 64 images.
Validation images chose the best member and, for fine-tuning and distillation, the learning rate.
Fine-tuning sees all training images with labels; recalibration, refit, matching, auto and \
distillation see 1,000 of them without labels.
CPU s: of refit, matching or training, all threads together; not of the fusion itself.
MFLOPs per image; latency per 64 images, measured once per architecture.
128 s in all: torch 2.14, Python 3.11, Z80, 2 cores.
torch.compile failed on [something]
"""

CONTROLS_TABLE = """\
**Same data**

| fused, % | control, % | difference, points | fused ahead in |
| --- | --- | ---: | ---: |
| NT + 100: 96.1 | member 1: 95.7 | +0.4 | 1 of 2 |
| auto: 95.7 | member 1: 95.7 | +0.0 | 0 of 2, level in 1 |

"""


def test_markdown():
    assert to_markdown(EXAMPLE) == MARKDOWN


def test_terminal_tables_have_the_same_cells(results):
    for numbers, seeds in (EXAMPLE, "mean [min, max] over 2 seeds"), (results, "one seed"):
        console = Console(file=io.StringIO(), width=160)
        for table in to_rich(numbers):
            console.print(table)
        printed = " ".join(console.file.getvalue().split())
        lines = [line for line in to_markdown(numbers).splitlines() if line.startswith("| ")]
        cells = [cell for line in lines if "---" not in line for cell in line[2:-2].split(" | ")]
        assert len(cells) >= 28
        for text in [*cells, f"Accuracy: {seeds}."]:
            assert text in printed


@pytest.fixture
def readme_tables(tmp_path, monkeypatch):
    """Return (page of the demo, page of the controls, results file, function that runs it)."""
    path = Path(__file__).parents[1] / "benchmarks" / "readme_tables.py"
    spec = importlib.util.spec_from_file_location("readme_tables", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    shown, controls, numbers = (tmp_path / name for name in ("demo.md", "when.md", "demo.json"))
    for page in (shown, controls):
        page.write_text("before\n<!-- demo:begin -->\nold\n<!-- demo:end -->\nafter\n")
    numbers.write_text(json.dumps(EXAMPLE))

    def run(*options):
        files = ["--demo", shown, "--controls", controls, "--results", numbers]
        monkeypatch.setattr(sys, "argv", ["readme_tables", *map(str, files), *options])
        return module.main()

    return shown, controls, numbers, run


def test_pages_are_rewritten_between_the_marks(readme_tables):
    shown, controls, numbers, run = readme_tables
    assert run("--check") == 1
    assert "old" in shown.read_text()
    assert "old" in controls.read_text()
    assert run() == 0
    for page, table in ((shown, MARKDOWN), (controls, CONTROLS_TABLE)):
        expected = f"before\n<!-- demo:begin -->\n{table}<!-- demo:end -->\nafter\n"
        assert page.read_text() == expected
    assert run("--check") == 0

    changed = copy.deepcopy(EXAMPLE)
    changed["seconds"] = 99.0
    numbers.write_text(json.dumps(changed))
    assert run("--check") == 1


@pytest.mark.parametrize("stale", [0, 1])
def test_each_page_is_checked(readme_tables, stale, capsys):
    *_, run = readme_tables
    run()
    page = readme_tables[stale]
    page.write_text(page.read_text().replace("95.7", "99.9"))
    assert run("--check") == 1
    assert capsys.readouterr().err.startswith(f"{page.name} is out of date")


@pytest.mark.parametrize("broken", [0, 1])
def test_without_marks_no_page_is_changed(readme_tables, broken):
    *pages, _, run = readme_tables
    pages[broken].write_text("nothing\n")
    before = [page.read_text() for page in pages]
    with pytest.raises(ValueError, match="demo:begin"):
        run()
    assert [page.read_text() for page in pages] == before
