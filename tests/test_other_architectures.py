"""Members of different architectures in one network of the base member's architecture."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy
import pytest
import torch
from torch import nn
from torch.nn import functional
from typer.testing import CliRunner

import fxfuse
from fxfuse import Calibration, Constraints, Match, Refit
from fxfuse.activations.calibration import CalibrationBatches
from fxfuse.cli.app import app
from fxfuse.errors import InputError, MemberError, OptionError
from fxfuse.refine.history import OTHER
from fxfuse.refine.judge import Asked, ask_members
from fxfuse.refine.regression.transfer import Student, cuts, draw_levels, fit_answer

CLASSES = 4
#: What classes are like: fixed directions of the inputs.
CENTRES = torch.randn(CLASSES, 1, 6, 6, generator=torch.Generator().manual_seed(7))


class Perceptron(nn.Module):
    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(36, width), nn.Linear(width, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x.flatten(1)).relu())


class Pixels(nn.Module):
    """A residual block with batch norms, whose shapes change twice."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width)
        self.inner = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.inner_norm = nn.BatchNorm2d(width)
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2)
        self.head = nn.Linear(2 * width, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.stem(x)).relu()
        x = (x + self.inner_norm(self.inner(x))).relu()
        return self.head(self.down(x).relu().mean((2, 3)))


def data(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (n,), generator=generator)
    return CENTRES[labels] + torch.randn(n, 1, 6, 6, generator=generator), labels


def trained(network: nn.Module, seed: int) -> nn.Module:
    inputs, labels = data(200, seed)
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    for _ in range(15):
        optimizer.zero_grad()
        functional.cross_entropy(network(inputs), labels).backward()
        optimizer.step()
    return network.eval()


@pytest.fixture(scope="module")
def members() -> list[nn.Module]:
    torch.manual_seed(0)
    return [
        trained(network, seed)
        for seed, network in enumerate([Perceptron(), Pixels(), Perceptron(9), Pixels()])
    ]


def far(network: Any, members: list[nn.Module], inputs: torch.Tensor) -> float:
    """KL divergence of the ensemble's probabilities from the network's, mean over the inputs."""
    with torch.no_grad():
        wanted = torch.stack([m(inputs).softmax(1) for m in members]).mean(0).log()
        return float((wanted.exp() * (wanted - network(inputs).log_softmax(1))).sum(1).mean())


INPUTS, FRESH = data(150, 10)[0], data(300, 11)[0]
STEPS = [Refit(), Match(steps=15, learning_rate=3e-3, augment=False)]
CALIBRATION = Calibration(INPUTS, augmentations=0)


@pytest.mark.parametrize("base", [0, 1], ids=["perceptron", "pixels"])
def test_a_member_takes_over_from_other_architectures(members, base):
    before = copy.deepcopy([m.state_dict() for m in members])
    chosen = members[:2] if base == 0 else members[:3]
    result = fxfuse.fuse(
        chosen,
        INPUTS[:4],
        calibration=CALIBRATION,
        refine=STEPS,
        constraints=Constraints(base_member=base),
    )
    history = result.history
    start = min(history.starts, key=lambda c: c.judged)
    assert start.name == f"member {base}"
    assert far(result.module, chosen, FRESH) < 0.7 * far(chosen[base], chosen, FRESH)
    assert history[history.chosen].judged <= start.judged
    # Others are listed, and are no starts.
    others = [i for i in range(len(chosen)) if i != base]
    assert [c.name for c in history.candidates if c.verdict == OTHER] == [
        f"member {i}" for i in others
    ]
    assert list(result.others) == others
    shown = str(result)
    assert f"{len(chosen)} members, 1 of {type(chosen[base]).__name__}" in shown
    assert type(chosen[1 - base]).__name__ in shown
    assert result.moved.kept
    assert "the last layer was fitted" in str(result.moved)
    assert history[f"member {base} refitted"].accepted
    # It is a network of the base member's class.
    own = result.to_module()
    assert type(own) is type(chosen[base])
    torch.testing.assert_close(own(FRESH), result.module(FRESH))
    for member, state in zip(members, before, strict=True):
        assert all(torch.equal(state[n], t) for n, t in member.state_dict().items())


def test_members_of_the_base_architecture_are_fused_as_ever(members):
    chosen = [members[1], members[0], members[3]]
    result = fxfuse.fuse(chosen, INPUTS[:4], calibration=CALIBRATION, refine=STEPS[:1])
    # By their numbers among all.
    assert {c.name for c in result.history.starts} == {"member 0", "member 2"}
    assert "refitted" in [c.name for c in result.history.candidates]
    assert result.plan.n_members == 2
    assert list(result.others) == [1]


def test_a_smaller_network_learns_from_all(members):
    chosen = members[:2]
    result = fxfuse.fuse(
        chosen, INPUTS[:4], calibration=CALIBRATION, refine=STEPS, size=0.5, verify=False
    )
    assert result.plan.sizes()["first.weight:0"] == 6
    assert far(result.module, chosen, FRESH) < far(Zero(), chosen, FRESH)


class Zero(nn.Module):
    """Knows nothing: all classes are equally probable."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.new_zeros(len(x), CLASSES)


def test_without_a_judge_what_is_asked_for_is_done(members):
    given = Calibration(INPUTS, augmentations=0, held_out=0)
    result = fxfuse.fuse(members[:2], INPUTS[:4], calibration=given, refine=STEPS[:1])
    assert result.history is None
    assert result.moved.head == ""
    assert far(result.module, members[:2], FRESH) < far(members[0], members[:2], FRESH)


def test_values_are_taken_over_too(members):
    result = fxfuse.fuse(
        members[:2],
        INPUTS[:4],
        calibration=CALIBRATION,
        refine=STEPS[:1],
        task=fxfuse.Regression(),
        verify=False,
    )
    refitted = result.history["member 0 refitted"]
    assert refitted.accepted
    assert refitted.judged < result.history["member 0"].judged


def student_of(network: nn.Module) -> tuple[Student, fxfuse.Program]:
    program = fxfuse.capture(network, INPUTS[:4])
    graph = fxfuse.analyze(program)
    plan = fxfuse.plan(graph, [network, copy.deepcopy(network)])
    return Student(graph, plan, network.state_dict()), program


def asked_of(networks: list[nn.Module], program: fxfuse.Program) -> Asked:
    batches = CalibrationBatches.of(program, CALIBRATION)
    return ask_members(fxfuse.Classification(), networks, batches)


def test_stages_end_where_the_shape_changes(members):
    student, program = student_of(members[1])
    assert [route.layer.weight for route in student.levels()] == ["inner.weight", "down.weight"]
    names = {node.name for node in cuts(program.graph)}
    # Within a residual block there are two ways.
    assert not any(name.startswith("batch_norm_1") for name in names)
    assert {"add", "relu_1", "mean", "linear"} <= names


def test_a_copy_has_nothing_to_teach(members):
    network = members[1]
    student, program = student_of(network)
    asked = asked_of([network, network], program)
    assert "no last layer is closer" in fit_answer(student, asked, fxfuse.Classification())
    before = network(FRESH)
    levels = draw_levels(student, {1: program}, asked, fxfuse.Classification())
    for level in levels:
        place, explained = level.similar[1]
        assert place == level.weight
        assert explained > 0.99
    network = copy.deepcopy(network)
    network.load_state_dict(student.state)
    torch.testing.assert_close(network(FRESH), before, rtol=0.05, atol=0.05)


def test_a_last_layer_that_cannot_be_fitted_says_why(members):
    student, program = student_of(members[0])
    asked = asked_of(members[:2], program)
    assert "Embedding" in fit_answer(student, asked, fxfuse.Embedding())
    program = fxfuse.capture(nn.Sequential(members[0], nn.Sigmoid()).eval(), INPUTS[:4])
    graph = fxfuse.analyze(program)
    network = [program, program]
    other = Student(graph, fxfuse.plan(graph, network), program.state())
    assert "no one layer" in fit_answer(other, asked, fxfuse.Classification())


def refused(kind: type[Exception], match: str, members: list[nn.Module], **options: Any) -> None:
    given = {"calibration": CALIBRATION, "refine": STEPS, **options}
    with pytest.raises(kind, match=match):
        fxfuse.fuse(members, INPUTS[:4], **given)


def test_what_cannot_be_combined_is_refused_before_work_starts(members):
    two = members[:2]
    refused(
        MemberError, r"calibration= inputs(.|\n)*fxfuse\.stack", two, calibration=None, refine=None
    )
    refused(OptionError, "base_member must be 0 to 1", two, constraints=Constraints(base_member=2))
    refused(
        OptionError,
        "without refit or matching",
        two,
        refine=[],
        method=fxfuse.Transplant(score="obs"),
    )
    wide = nn.Sequential(nn.Flatten(), nn.Linear(36, CLASSES + 1))
    refused(MemberError, "member 1 differs from member 0: outputs", [members[0], wide])
    certain = nn.Sequential(members[1], nn.Softmax(1)).eval()
    refused(OptionError, "what its output means", [members[0], certain])
    refused(InputError, "member|inputs", [members[0], nn.Sequential(nn.Linear(5, CLASSES))])


FACTORIES = """
from torch import nn


def made(kind="deep"):
    last = [nn.Linear(4, 3)] if kind == "deep" else []
    return nn.Sequential(nn.Linear(5, 4 if last else 3), nn.Tanh(), *last)
"""


def test_on_the_command_line_each_member_has_its_own_arguments(tmp_path, monkeypatch):
    (tmp_path / "kinds_of_networks.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    deep = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    torch.save(deep.state_dict(), "a.pt")
    torch.save(nn.Sequential(nn.Linear(5, 3), nn.Tanh()).state_dict(), "b.pt")
    numpy.save("inputs.npy", torch.randn(120, 5).numpy())
    networks = ("a.pt", "b.pt", "--model", "kinds_of_networks:made", "--input", "5")
    networks += ("--member-arg", "1:kind=flat")
    stacked = CliRunner().invoke(app, ["stack", *networks, "--out", "stack"])
    assert stacked.exit_code == 0, stacked.output
    options = ("--calibration", "inputs.npy", "--match-steps", "3", "--task", "regression")
    fused = CliRunner().invoke(app, ["fuse", *networks, *options, "--out", "one", "--json"])
    assert fused.exit_code == 0, fused.output
    names = [c["name"] for c in json.loads(fused.stdout)["history"]["candidates"]]
    assert "member 0" in names
    assert "member 1" in names
    fxfuse.load("one")(torch.randn(2, 5))
