"""Partial fusion: one trunk, and every member's head on it."""

from __future__ import annotations

import copy
import importlib.util
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import fxfuse
from fxfuse import Constraints, verify
from fxfuse.analysis.heads import join
from fxfuse.analysis.label_spaces import Heads
from fxfuse.errors import MemberError, OptionError
from fxfuse.transform.resizing import emit_resized
from tests.models import excite
from tests.nets import SmallResNet, images
from tests.options import planned


def member(seed: int, classes: int, dtype: torch.dtype = torch.float64) -> SmallResNet:
    torch.manual_seed(seed)
    return excite(SmallResNet(classes=classes).to(dtype), images(8, dtype))


class Tower(nn.Module):
    """A trunk, and a head of several layers whose constants and views know the class count."""

    def __init__(self, classes: int, hidden: int = 5) -> None:
        super().__init__()
        self.classes = classes
        self.trunk = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh())
        self.norm = nn.BatchNorm1d(6)
        self.up = nn.Linear(6, hidden)
        self.scale = nn.Linear(hidden, 2 * classes)
        self.register_buffer("offset", torch.arange(classes) / 10)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        h = self.scale(self.up(self.norm(self.trunk(x))).relu())
        pairs = h.view(x.shape[0], 2, self.classes)
        ramp = torch.arange(self.classes, device=x.device, dtype=x.dtype)
        return {"logits": pairs.mean(1) + self.offset + ramp, "pairs": pairs}


HEADS = ("norm", "up", "scale", "offset")


def tower(seed: int, classes: int, hidden: int = 5) -> Tower:
    torch.manual_seed(seed)
    return excite(Tower(classes, hidden).double(), torch.randn(16, 4).double())


def one_trunk(members: list[nn.Module], heads: tuple[str, ...]) -> None:
    """Gives all members the trunk of the first."""
    own = [{n: t for n, t in m.state_dict().items() if n.startswith(heads)} for m in members]
    for m, head in zip(members, own, strict=True):
        m.load_state_dict({**members[0].state_dict(), **head})


@pytest.mark.parametrize("n", [2, 3])
def test_heads_on_one_trunk_answer_as_their_members(n: int):
    members = [member(seed, classes=3 + seed) for seed in range(n)]
    one_trunk(members, ("fc",))
    x = images(dtype=torch.float64)
    result = fxfuse.fuse(members, x, method="average", heads=Heads(Heads(["fc"])))
    answers = result.module(x)
    assert isinstance(answers, tuple)
    for m, answer in zip(members, answers, strict=True):
        torch.testing.assert_close(answer, m(x))
    assert result.heads == {
        f"heads.{i}.fc.{name}": i for i in range(n) for name in ("weight", "bias")
    }
    assert set(result.state_dict()) == {
        *(name for name in members[0].state_dict() if not name.startswith("fc.")),
        *result.heads,
    }
    assert result.verification.passed
    assert result.verification.checks[0].name == "permutation"


def test_heads_keep_their_order_constants_and_structure():
    members = [tower(0, 3), tower(1, 7, hidden=9)]
    one_trunk(members, HEADS)
    x = torch.randn(5, 4).double()
    result = fxfuse.fuse(members, x, method="average", heads=Heads(Heads(HEADS)))
    # At another batch size too.
    x = torch.randn(9, 4).double()
    for m, answer in zip(members, result.module(x), strict=True):
        assert set(answer) == {"logits", "pairs"}
        torch.testing.assert_close(answer["logits"], m(x)["logits"])
        torch.testing.assert_close(answer["pairs"], m(x)["pairs"])
    assert {g.name for g in result.graph.groups} == {"trunk.0.weight:0", "trunk.2.weight:0"}
    assert "head of one member" in result.graph.explain("heads.1.up.weight", 0)


def test_a_permuted_trunk_is_aligned_and_its_head_with_it():
    members = [tower(0, 3), tower(1, 7)]
    one_trunk(members, HEADS)
    order = torch.tensor([2, 0, 1, 5, 4, 3])
    x = torch.randn(5, 4).double()
    expected = [m(x)["logits"] for m in members]
    norm, other = members[1].norm, members[1]
    with torch.no_grad():
        vectors = (other.trunk[2].bias, *norm.parameters(), norm.running_mean, norm.running_var)
        for tensor in (other.trunk[2].weight, *vectors):
            tensor.copy_(tensor[order])
        other.up.weight.copy_(other.up.weight[:, order])
    torch.testing.assert_close(other(x)["logits"], expected[1])
    result = fxfuse.fuse(members, x, method="weight_matching", heads=Heads(Heads(HEADS)))
    for logits, answer in zip(expected, result.module(x), strict=True):
        torch.testing.assert_close(answer["logits"], logits)


def test_statistics_in_a_head_stand_in_for_units_of_others():
    members = [tower(0, 3), tower(1, 3)]
    result = fxfuse.fuse(members, torch.randn(5, 4).double(), heads=Heads(Heads(HEADS)))
    units = result.plan.map_of("trunk.2.weight:0")
    assert len(set(units.member)) == 2
    for i in range(2):
        weight = result.state_dict()[f"heads.{i}.norm.weight"]
        variance = result.state_dict()[f"heads.{i}.norm.running_var"]
        for place, (j, unit) in enumerate(zip(units.member, units.unit, strict=True)):
            assert weight[place] == (members[i].norm.weight[unit] if i == j else 0)
            assert variance[place] == members[j].norm.running_var[unit]


def kill(model: SmallResNet, streams: range, inner: range) -> None:
    """Units that neither do nor hear anything."""
    with torch.no_grad():
        for block in (model.block1, model.block2):
            for name, rows in (("conv1", inner), ("conv2", streams)):
                getattr(block, name).weight[list(rows)] = 0
            for norm, rows in ((block.bn1, inner), (block.bn2, streams)):
                norm.weight[list(rows)] = norm.bias[list(rows)] = 0
            block.conv1.weight[:, list(streams)] = 0
            block.conv2.weight[:, list(inner)] = 0
        model.stem.weight[list(streams)] = 0
        model.bn.weight[list(streams)] = model.bn.bias[list(streams)] = 0
        model.fc.weight[:, list(streams)] = 0


def test_transplanted_halves_answer_as_their_members():
    """Half of every member's units are dead: fusion keeps the living ones, side by side."""
    members = [member(0, 3), member(1, 5)]
    kill(members[0], range(4), range(2, 6))
    kill(members[1], range(4, 8), range(0, 8, 2))
    x = images(dtype=torch.float64)
    result = fxfuse.fuse(members, x, heads=Heads(Heads("fc")))
    for m, answer in zip(members, result.module(x), strict=True):
        torch.testing.assert_close(answer, m(x))
    units = result.plan.map_of("stem.weight:0")
    for i, m in enumerate(members):
        weight = result.state_dict()[f"heads.{i}.fc.weight"]
        for column, (j, unit) in enumerate(zip(units.member, units.unit, strict=True)):
            expected = m.fc.weight[:, unit] if i == j else torch.zeros(len(weight)).double()
            assert torch.equal(weight[:, column], expected)


@pytest.mark.parametrize("heads", [("fc",), ("block2", "fc")])
def test_every_head_of_the_concatenation_answers_as_its_member(heads: tuple[str, ...]):
    """The wide oracle of a partial fusion: no head is averaged."""
    members = [member(0, 3), member(1, 5), member(2, 4)]
    x = images(dtype=torch.float64)
    joined = join([fxfuse.capture(m, x) for m in members], Heads(heads))
    graph = fxfuse.analyze(joined.program)
    plan = planned(graph, joined.states, "wide")
    if heads == ("fc",):
        assert plan.inexact() == []
        wide = emit_resized(graph, plan, joined.states)
        assert wide.get_parameter("block1.conv1.weight").shape[:2] == (24, 24)
        for m, answer in zip(members, wide(x), strict=True):
            torch.testing.assert_close(answer, m(x))
    assert verify.permutation_of(graph).passed


def test_a_head_of_convolutions_and_norms():
    members = [member(0, 3), member(1, 5)]
    x = images(dtype=torch.float64)
    one_trunk(members, ("block2", "fc"))
    result = fxfuse.fuse(members, x, method="average", heads=Heads(Heads(["block2", "f?"])))
    for m, answer in zip(members, result.module(x), strict=True):
        torch.testing.assert_close(answer, m(x))


def test_outputs_of_the_trunk_stand_in_every_entry():
    class WithFeatures(nn.Module):
        def __init__(self, classes: int) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 6)
            self.head = nn.Linear(6, classes)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            h = self.second(self.first(x).relu())
            return self.head(h), h

    members = [WithFeatures(2), WithFeatures(3)]
    one_trunk(members, ("head",))
    x = torch.randn(3, 4)
    result = fxfuse.fuse(members, x, method="average", heads=Heads(Heads(["head"])))
    for m, (logits, h) in zip(members, result.module(x), strict=True):
        torch.testing.assert_close(logits, m(x)[0])
        torch.testing.assert_close(h, m(x)[1])


def test_an_in_place_trunk_after_a_head_keeps_its_place():
    """An auxiliary head reads the trunk before the trunk overwrites itself."""

    class Auxiliary(nn.Module):
        def __init__(self, classes: int) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 6)
            self.early, self.late = nn.Linear(8, classes), nn.Linear(6, classes)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            h = self.first(x)
            early = self.early(h)
            h.relu_()
            return early, self.late(self.second(h).relu())

    members = [Auxiliary(2), Auxiliary(3)]
    one_trunk(members, ("early", "late"))
    x = torch.randn(3, 4)
    result = fxfuse.fuse(members, x, method="average", heads=Heads(Heads(["early", "late"])))
    for m, answer in zip(members, result.module(x), strict=True):
        torch.testing.assert_close(answer, m(x))


def test_hosted_units_reach_the_hosts_head_only():
    members = [member(0, 3), member(1, 5)]
    x = images(dtype=torch.float64)
    result = fxfuse.fuse(
        members,
        x,
        constraints=Constraints(ignore=["stem", "bn"], base_member=1),
        heads=Heads(Heads(["fc"])),
    )
    state = result.state_dict()
    assert torch.equal(state["heads.1.fc.weight"], members[1].fc.weight)
    assert not state["heads.0.fc.weight"].any()
    assert torch.equal(state["heads.0.fc.bias"], members[0].fc.bias)


def test_the_module_trains_pickles_and_compiles():
    members = [member(0, 3, torch.float32), member(1, 5, torch.float32)]
    x = images()
    module = fxfuse.fuse(members, x, heads=Heads(Heads(["fc"]))).module
    expected = module(x)
    again = pickle.loads(pickle.dumps(module))
    for found in (again(x), copy.deepcopy(module)(x), torch.compile(module, fullgraph=True)(x)):
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    module.train()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    a, b = module(x)
    loss = nn.functional.cross_entropy(a, torch.arange(4) % 3)
    (loss + nn.functional.cross_entropy(b, torch.arange(4))).backward()
    optimizer.step()
    for name in ("stem.weight", "heads.0.fc.weight", "heads.1.fc.weight", "bn.running_mean"):
        assert not torch.equal(module.state_dict()[name], before[name]), name
    assert int(module.state_dict()["bn.num_batches_tracked"]) == 1 + int(
        before["bn.num_batches_tracked"]
    )


def test_plans_with_heads_survive_json():
    members = [member(0, 3), member(1, 5)]
    result = fxfuse.fuse(members, images(dtype=torch.float64), heads=Heads(Heads(["fc"])))
    plan = fxfuse.FusionPlan.from_json(result.plan.to_json())
    assert (plan.heads, plan.heads.modules) == (result.plan.heads, ("fc",))
    owners = {name: plan.roles[name].member for name in plan.names_of("head")}
    assert owners == result.heads
    assert "- `heads.1.fc.weight`: member 1" in plan.summary()


class Coda(nn.Module):
    """After what may be called its head, the network goes on."""

    def __init__(self, *, tied: bool = False, writes: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.head = nn.Linear(8, 8)
        self.coda = nn.Linear(8, 2)
        self.shift = nn.Module()
        self.shift.bias = nn.Parameter(torch.rand(4))
        self.unused = nn.Linear(2, 2)
        self.writes = writes
        if tied:
            self.head.weight = nn.Parameter(torch.rand(8, 8))
            self.second = nn.Linear(8, 8)
            self.second.weight = self.head.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.writes:
            # Into an input: writes into activations become values at capture.
            x.add_(self.shift.bias)
        h = self.first(x)
        h = self.second(h) if hasattr(self, "second") else h
        return self.coda(self.head(h.relu()).relu())


@pytest.mark.parametrize(
    ("options", "heads", "message"),
    [
        ({}, ["head"], r"feeds back(.|\n)*reads coda\.(bias|weight), which is not in a head"),
        ({"writes": True}, ["shift"], "feeds back(.|\n)*in place(.|\n)*other heads"),
        ({"tied": True}, ["head", "coda"], r"shares a parameter(.|\n)*second\.weight"),
        ({}, ["unused"], "does not use the heads"),
        ({}, ["*"], "whole network"),
    ],
)
def test_heads_that_cannot_be_kept_apart(options: dict[str, bool], heads: list[str], message: str):
    with pytest.raises(OptionError, match=message):
        fxfuse.fuse(
            [Coda(**options), Coda(**options)], torch.randn(3, 4), heads=Heads(Heads(heads))
        )


def test_bad_input():
    members = [member(0, 3), member(1, 5)]
    x = images(dtype=torch.float64)
    with pytest.raises(MemberError, match=r"member 1 differs from member 0 (.|\n)*heads="):
        fxfuse.fuse(members, x)
    with pytest.raises(OptionError, match=r"heads='fcc' matches nothing(.|\n)*fc"):
        fxfuse.fuse(members, x, heads=Heads(Heads(["fcc"])))
    with pytest.raises(OptionError, match="every head keeps"):
        fxfuse.fuse(
            members, x, constraints=Constraints(freeze=["*fc.weight"]), heads=Heads(Heads(["fc"]))
        )
    wider = excite(SmallResNet(width=16, classes=5).double(), x)
    with pytest.raises(MemberError, match="member 1 differs from member 0: shapes"):
        fxfuse.fuse([members[0], wider], x, heads=Heads(["fc"]))

    class Quadratic(SmallResNet):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x * x)

    with pytest.raises(MemberError, match="graphs"):
        fxfuse.fuse(
            [members[0], Quadratic(classes=5).double().eval()], x, heads=Heads(Heads(["fc"]))
        )
    result = fxfuse.fuse(members, x, heads=Heads(Heads(["fc"])))
    with pytest.raises(OptionError, match="2 heads"):
        result.load_into(SmallResNet(classes=3))


def test_equal_heads_are_kept_too():
    """Members of one task may keep their heads as well: no mean is taken."""
    members = [member(0, 4), member(1, 4)]
    x = images(dtype=torch.float64)
    result = fxfuse.fuse(members, x, heads=Heads(Heads(["fc"])))
    assert [tuple(y.shape) for y in result.module(x)] == [(4, 4), (4, 4)]
    units = result.plan.map_of("stem.weight:0")
    mine = torch.from_numpy(np.flatnonzero(units.member == 1))
    found = result.state_dict()["heads.1.fc.weight"][:, mine]
    assert torch.equal(found, members[1].fc.weight[:, units.unit[units.member == 1]])


def test_the_benchmark_runs():
    path = Path(__file__).parents[1] / "benchmarks" / "partial_fusion.py"
    spec = importlib.util.spec_from_file_location("partial_fusion_benchmark", path)
    benchmark = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up by name.
    sys.modules[spec.name] = benchmark
    try:
        spec.loader.exec_module(benchmark)
        rows = benchmark.summarise([benchmark.measure(0, member_steps=3, tune_steps=2)])
    finally:
        del sys.modules[spec.name]
    assert {row["task"] for row in rows} == set(benchmark.TASKS)
    assert all(0 <= row["min"] <= row["mean"] <= row["max"] <= 100 for row in rows)
