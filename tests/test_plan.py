"""Plans that know their members: hashes, digests, and plans that are applied again."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fxfuse
from fxfuse.errors import MemberError, OptionError, PlanError
from fxfuse.members.fingerprint import digest_of, fingerprint
from fxfuse.planning.plan import MemberRecord
from tests.nets import SmallResNet, images, resnets


def through_json(plan: fxfuse.FusionPlan) -> fxfuse.FusionPlan:
    return fxfuse.FusionPlan.from_json(plan.to_json())


@pytest.fixture(scope="module")
def plan() -> fxfuse.FusionPlan:
    return fxfuse.fuse(resnets(2), images()).plan


def attention(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True, dropout=0.0)
    return nn.Sequential(layer, nn.Flatten(), nn.Linear(80, 3)).eval()


def assert_equal_networks(first: fxfuse.FusionResult, second: fxfuse.FusionResult) -> None:
    ours, theirs = first.state_dict(), second.state_dict()
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("width", [0.5, 1, 1.5, 2])
@pytest.mark.parametrize("network", ["resnet", "attention"])
def test_a_plan_applied_again_gives_the_same_tensors(network: str, width: float) -> None:
    if network == "resnet":
        members, x = resnets(2), images()
    else:
        members, x = [attention(seed) for seed in range(2)], torch.randn(3, 5, 16)
    first = fxfuse.fuse(members, x, width=width)
    again = fxfuse.fuse(members, x, plan=through_json(first.plan))
    assert_equal_networks(first, again)
    assert again.plan.to_json() == first.plan.to_json()
    assert torch.equal(again.module(x), first.module(x))


@pytest.mark.parametrize(
    "options",
    [
        {"freeze": "stem.*", "base_member": 1},
        {"ignore": ["block1"], "width": 1.5},
        {"share": ("stem.weight",), "width": 0.5},
        {"heads": ["fc"]},
        {"output_dims": {0: ()}},
        {"method": "weight_matching"},
        {"score": "l1", "variant": "iterative"},
    ],
)
def test_a_plan_holds_what_was_asked(options: dict[str, Any]) -> None:
    members, x = resnets(2, torch.float64), images(dtype=torch.float64)
    first = fxfuse.fuse(members, x, **options)
    again = fxfuse.fuse(members, x, plan=through_json(first.plan))
    assert_equal_networks(first, again)
    assert again.plan.digest == first.plan.digest


def test_a_refit_may_follow_a_plan() -> None:
    members, x = resnets(2), images()
    calibration = images(64)
    first = fxfuse.fuse(members, x, calibration=calibration, refit=True)
    again = fxfuse.fuse(members, x, plan=first.plan, calibration=calibration, refit=True)
    assert_equal_networks(first, again)


def test_other_members_are_told_from_these(plan: fxfuse.FusionPlan) -> None:
    members, x = resnets(3), images()
    with pytest.raises(PlanError, match="made for 2 members, and 3 are given"):
        fxfuse.fuse(members, x, plan=plan)
    with pytest.raises(PlanError, match=r"member 1 is not the network.*\n.*stem\.weight"):
        fxfuse.fuse([members[0], members[2]], x, plan=plan)
    with pytest.raises(PlanError, match="it is the plan's member 1"):
        fxfuse.fuse(members[1::-1], x, plan=plan)
    with torch.no_grad():
        members[1].block2.bn2.bias[3] += 0.1
    with pytest.raises(PlanError, match="member 1 is not the network that the plan") as caught:
        fxfuse.fuse(members[:2], x, plan=plan)
    assert caught.value.where == "block2.bn2.bias"
    assert caught.value.why.startswith("1 of ")
    other = [SmallResNet(width=4).eval() for _ in range(2)]
    with pytest.raises(PlanError, match=r"member 0.*\n.*stem\.weight"):
        fxfuse.fuse(other, x, plan=plan)


def test_a_tensor_that_only_one_side_has_is_named() -> None:
    def member(seed: int, bias: bool) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 8, bias=bias), nn.ReLU(), nn.Linear(8, 2)).eval()

    x = torch.randn(3, 4)
    plan = fxfuse.fuse([member(i, True) for i in range(2)], x).plan
    with pytest.raises(PlanError, match=r"only the plan has 0\.bias"):
        fxfuse.fuse([member(i, False) for i in range(2)], x, plan=plan)


def test_an_edited_plan_is_refused(plan: fxfuse.FusionPlan) -> None:
    text = plan.to_json()
    value = json.loads(text)
    value["maps"][0]["unit"][0] += 1
    for edited in (json.dumps(value), text.replace('"transplant"', '"average"')):
        with pytest.raises(PlanError, match="was edited"):
            fxfuse.FusionPlan.from_json(edited)
    # How the text is set is no edit.
    fxfuse.FusionPlan.from_json(json.dumps(json.loads(text), sort_keys=True))


def test_a_plan_without_hashes_can_be_read_and_not_applied(plan: fxfuse.FusionPlan) -> None:
    unknown = through_json(replace(plan, members=(MemberRecord(), MemberRecord())))
    assert "block1.conv1.weight:0" in unknown.summary()
    with pytest.raises(PlanError, match="does not say for which members"):
        fxfuse.fuse(resnets(2), images(), plan=unknown)


@pytest.mark.parametrize("schema", [1, 2, 3, 5, "4", None, [[]]])
def test_a_plan_of_another_schema_is_to_be_made_again(
    plan: fxfuse.FusionPlan, schema: object
) -> None:
    text = json.dumps(json.loads(plan.to_json()) | {"schema": schema})
    with pytest.raises(
        PlanError, match=r"unknown plan schema .*, expected 4(.|\n)*make the plan again"
    ):
        fxfuse.FusionPlan.from_json(text)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "average"},
        {"score": "l2"},
        {"width": 0.5},
        {"max_params": 1000},
        {"round_to": 8},
        {"mixing": "joint"},
        {"freeze": "stem.*"},
        {"ignore": ["block1"]},
        {"heads": ["fc"]},
        {"output_dims": {0: ()}},
        {"base_member": 1},
        {"steps": 10},
    ],
)
def test_what_a_plan_holds_may_not_be_given_as_well(
    plan: fxfuse.FusionPlan, options: dict[str, Any]
) -> None:
    members, x = resnets(2), images()
    with pytest.raises(
        OptionError, match=f"{next(iter(options))}=.* and plan= contradict each other"
    ):
        fxfuse.fuse(members, x, plan=plan, **options)


def test_maps_of_units_that_there_are_not(plan: fxfuse.FusionPlan) -> None:
    members, x = resnets(2), images()
    first, *others = plan.maps
    for entry, what in (
        (replace(first, unit=first.unit + 8), "unit"),
        (replace(first, member=first.member + 1), "member"),
        (replace(first, target=first.target - 1), "fused unit"),
    ):
        with pytest.raises(PlanError, match=f"{what} out of range: must be 0 to"):
            fxfuse.fuse(members, x, plan=replace(plan, maps=(entry, *others)))
    with pytest.raises(PlanError, match="have different coupling groups"):
        fxfuse.fuse(members, x, plan=replace(plan, maps=tuple(others)))


def test_a_single_member_needs_a_plan_of_one(plan: fxfuse.FusionPlan) -> None:
    members, x = resnets(2), images()
    with pytest.raises(MemberError, match="fusion needs at least 2 members, got 1"):
        fxfuse.fuse(members[:1], x)
    with pytest.raises(PlanError, match="made for 2 members"):
        fxfuse.fuse(members[:1], x, plan=plan)


# --- fingerprints ---


def test_a_fingerprint_does_not_depend_on_strides() -> None:
    tensor = torch.randn(6, 5, 4, 3)
    spread = tensor.to(memory_format=torch.channels_last)
    assert fingerprint({"w": tensor}) == fingerprint({"w": spread})
    assert fingerprint({"w": tensor.mT}) != fingerprint({"w": tensor})


@pytest.mark.parametrize(
    "dtype",
    [torch.float16, torch.bfloat16, torch.float64, torch.complex64, torch.int64, torch.bool],
)
def test_a_fingerprint_of_any_dtype(dtype: torch.dtype) -> None:
    zero, one = (torch.full((), value).to(dtype) for value in (0, 1))
    assert fingerprint({"w": zero}) == fingerprint({"w": zero.clone()})
    assert fingerprint({"w": zero}) != fingerprint({"w": one})
    assert fingerprint({"w": zero}) != fingerprint({"w": zero.reshape(1)})
    assert fingerprint({"w": zero}) != fingerprint({"v": zero})
    assert fingerprint({"w": torch.empty(0, 3)}) != fingerprint({"w": torch.empty(3, 0)})


def test_a_fingerprint_reads_no_more_than_a_sample() -> None:
    large = torch.zeros(3, 100_000)
    before = fingerprint({"w": large})
    chosen = np.arange(4096) * large.numel() // 4096
    assert 1 not in chosen
    large.view(-1)[1] = 1
    assert fingerprint({"w": large}) == before
    large.view(-1)[int(chosen[-1])] = 1
    assert fingerprint({"w": large}) != before


def test_a_digest_is_of_content() -> None:
    assert digest_of({"a": 1.0, "b": [2]}) == digest_of(json.loads('{ "b": [2], "a": 1.0 }'))
    assert digest_of({"a": 1.0}) != digest_of({"a": 1.5})
