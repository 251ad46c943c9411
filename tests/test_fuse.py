from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

import fxfuse
from fxfuse import Constraints, Example, Transplant
from fxfuse.errors import (
    CheckpointError,
    MemberError,
    OptionError,
    PlanError,
    VerificationError,
)
from fxfuse.planning.methods import methods
from tests.nets import SmallResNet, images, resnets


@pytest.mark.parametrize("score", ["l1", "l2"])
@pytest.mark.parametrize("variant", [None, "iterative", "hierarchical"])
@pytest.mark.parametrize("n", [2, 3, 5])
def test_transplant(score: str, variant: str | None, n: int):
    members = resnets(n)
    x = images()
    result = fxfuse.fuse(members, x, method=Transplant(score=score, variant=variant))
    assert result.verification.passed
    state, template = result.module.state_dict(), members[0].state_dict()
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in template.items()}
    assert list(state) == list(template)
    for unit_map in result.plan.maps:
        pairs = set(zip(unit_map.member.tolist(), unit_map.unit.tolist(), strict=True))
        assert len(pairs) == unit_map.n_units, "no unit twice"
        assert unit_map.member.max() < n
    torch.testing.assert_close(result.load_into(SmallResNet()).eval()(x), result.module(x))


def test_every_weight_is_where_the_plan_says():
    members = resnets(3)
    result = fxfuse.fuse(members, images())
    stem = result.plan.map_of("stem.weight:0")
    inner = result.plan.map_of("block1.conv1.weight:0")
    state = result.module.state_dict()
    for row, (i, u) in enumerate(zip(inner.member, inner.unit, strict=True)):
        for column, (j, v) in enumerate(zip(stem.member, stem.unit, strict=True)):
            found = state["block1.conv1.weight"][row, column]
            kept = members[i].block1.conv1.weight[u, v] if i == j else torch.zeros(3, 3)
            assert torch.equal(found, kept)
    torch.testing.assert_close(
        state["fc.bias"], torch.stack([m.fc.bias.detach() for m in members]).mean(0)
    )
    j, v = stem.member[2], stem.unit[2]
    torch.testing.assert_close(state["fc.weight"][:, 2], members[j].fc.weight[:, v] / 3)


def test_the_most_important_units_are_kept():
    members = resnets(2)
    with torch.no_grad():
        members[1].block1.conv1.weight[:5] *= 100
    unit_map = fxfuse.fuse(members, images()).plan.map_of("block1.conv1.weight:0")
    assert unit_map.unit[unit_map.member == 1].tolist()[:5] == [0, 1, 2, 3, 4]


def test_members_stay_as_they_were():
    members = resnets(2)
    before = [{k: v.clone() for k, v in m.state_dict().items()} for m in members]
    result = fxfuse.fuse(members, images())
    with torch.no_grad():
        for parameter in result.module.parameters():
            parameter.zero_()
    for member, state in zip(members, before, strict=True):
        for name, tensor in member.state_dict().items():
            assert torch.equal(tensor, state[name]), name


def test_aligning_permuted_copies_gives_the_network_back():
    from fxfuse import verify

    check = verify.identity(resnets(1, torch.float64)[0], images(dtype=torch.float64))
    assert check.passed, check


def test_plans_survive_json():
    plan = fxfuse.fuse(resnets(3), images()).plan
    again = fxfuse.FusionPlan.from_json(plan.to_json())
    assert again.to_json() == plan.to_json()
    assert np.array_equal(again.maps[0].unit, plan.maps[0].unit)
    assert "block1.conv1.weight:0" in plan.summary()
    for text in ("", "{}", "[1]"):
        with pytest.raises(PlanError, match="this is not a fusion plan"):
            fxfuse.FusionPlan.from_json(text)
    with pytest.raises(PlanError, match="unknown plan schema 99"):
        fxfuse.FusionPlan.from_json(json.dumps({"schema": 99}))


def test_exported_programs_and_graph_modules_fuse_too():
    members = resnets(2)
    x = images()
    expected = fxfuse.fuse(members, x).module(x)
    batch = {0: torch.export.Dim.DYNAMIC}
    programs = [torch.export.export(m, (x,), dynamic_shapes=(batch,)) for m in members]
    torch.testing.assert_close(fxfuse.fuse(programs, x).module(x), expected)
    traced = [torch.fx.symbolic_trace(m) for m in members]
    torch.testing.assert_close(fxfuse.fuse(traced, x).module(x), expected)
    fused = [fxfuse.fuse(members, x).module, fxfuse.fuse(members[::-1], x).module]
    assert fxfuse.fuse(fused, x).verification.passed


def test_keyword_inputs():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(3, 6)
            self.head = nn.Linear(6, 2)

        def forward(self, x: torch.Tensor, *, y: torch.Tensor) -> torch.Tensor:
            return self.head((self.a(x) + self.b(y)).relu())

    x, y = torch.randn(3, 4), torch.randn(3, 3)
    result = fxfuse.fuse([Two(), Two()], Example(x, kwargs={"y": y}))
    assert result.module(x[:2], y=y[:2]).shape == (2, 2)
    assert [g.n_units for g in result.graph.groups] == [6]


class Unknown(nn.Module):
    """Inside the network, an operator that no rule covers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.second = nn.Linear(8, 8)
        self.third = nn.Linear(8, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.second(self.first(x).relu()).cumsum(-1)
        return self.head(self.third(x).relu())


def test_what_is_frozen_inside_stays_the_hosts():
    members = [Unknown(), Unknown()]
    result = fxfuse.fuse(members, torch.randn(3, 4), constraints=Constraints(base_member=1))
    state = result.module.state_dict()
    assert "second.bias" in result.plan.names_of("base")
    assert torch.equal(state["second.bias"], members[1].second.bias)
    third = result.plan.map_of("third.weight:0")
    mine = torch.from_numpy(third.unit[third.member == 1])
    rows = torch.from_numpy(third.target[third.member == 1])
    assert torch.equal(state["third.weight"][rows], members[1].third.weight[mine])
    others = torch.from_numpy(third.target[third.member == 0])
    assert not state["third.weight"][others].any(), (
        "the base member's neurons do not feed others' units"
    )
    assert "Kept from the base member" in result.plan.summary()


def test_a_shared_parameter_is_averaged_and_listed():
    class Scaled(nn.Module):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.first = nn.Linear(4, 8)
            self.scale = nn.Parameter(torch.tensor(scale))
            self.head = nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head((self.first(x) * self.scale).relu())

    plan = fxfuse.fuse([Scaled(1.0), Scaled(3.0)], torch.randn(3, 4)).plan
    assert plan.names_of("averaged") == ("scale",)
    assert plan.roles["scale"].spread == 2.0
    assert any("scale" in line for line in plan.inexact())
    agreeing = fxfuse.fuse([Scaled(1.0), Scaled(1.0)], torch.randn(3, 4)).plan
    assert agreeing.inexact() == []


def test_bad_input():
    x = images()
    good, other = resnets(2)
    for members in ([], [good]):
        with pytest.raises(MemberError, match="fusion needs at least 2 members"):
            fxfuse.fuse(members, x)
    with pytest.raises(OptionError, match="average, cluster, concatenate, optimal_transport"):
        fxfuse.fuse([good, other], x, method="magic")
    with pytest.raises(OptionError, match="hierarchical"):
        fxfuse.fuse([good, other], x, method=Transplant(variant="sideways"))
    with pytest.raises(OptionError, match=r"unknown score 'l3'(.|\n)*l1, l2"):
        fxfuse.fuse([good, other], x, method=Transplant(score="l3"))
    with pytest.raises(MemberError, match="reaches the network's output"):
        fxfuse.fuse([good, SmallResNet(classes=7)], x)
    with torch.no_grad():
        other.block1.conv1.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(MemberError, match="member 1 holds weights that are not finite") as caught:
        fxfuse.fuse([good, other], x)
    assert caught.value.where == "block1.conv1.weight"
    with pytest.raises(PlanError, match="nothing in this network can be fused"):
        fxfuse.fuse([nn.Linear(4, 2), nn.Linear(4, 2)], torch.randn(3, 4))
    with pytest.raises(CheckpointError, match="SmallResNet"):
        fxfuse.fuse(resnets(2), x).load_into(SmallResNet(width=4))


def test_a_network_that_answers_nan_is_not_handed_over():
    members = resnets(2)
    for member in members:
        with torch.no_grad():
            member.bn.running_var.fill_(-1.0)
    with pytest.raises(VerificationError, match="finite"):
        fxfuse.fuse(members, images())
    assert fxfuse.fuse(members, images(), verify=False).verification.checks == ()


def test_registered_methods():
    assert set(methods()) == {
        "activation_matching",
        "average",
        "optimal_transport",
        "transplant",
        "weight_matching",
        "concatenate",
        "zip",
        "cluster",
        "partial",
    }
