"""Plans that know their members: hashes, digests, and plans that are applied again."""

from __future__ import annotations

import inspect
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fxfuse
from fxfuse import Constraints, Refit, Transplant
from fxfuse.errors import MemberError, OptionError, PlanError
from fxfuse.members.fingerprint import digest_of, fingerprint
from fxfuse.planning.plan import MemberRecord, UnitMap
from tests.nets import SmallResNet, images, resnets
from tests.options import flat


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
    first = fxfuse.fuse(members, x, size=width)
    again = fxfuse.build(through_json(first.plan), members, x)
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
    first = fxfuse.fuse(members, x, **flat(**options))
    again = fxfuse.build(through_json(first.plan), members, x)
    assert_equal_networks(first, again)
    assert again.plan.digest == first.plan.digest


def test_a_refit_may_follow_a_plan() -> None:
    members, x = resnets(2), images()
    calibration = images(64)
    method, steps = Transplant(score="l2"), [Refit()]
    first = fxfuse.fuse(members, x, calibration=calibration, method=method, refine=steps)
    again = fxfuse.build(first.plan, members, x, calibration=calibration, refine=steps)
    assert_equal_networks(first, again)


def test_other_members_are_told_from_these(plan: fxfuse.FusionPlan) -> None:
    members, x = resnets(3), images()
    with pytest.raises(PlanError, match="made for 2 members, got 3"):
        fxfuse.build(plan, members, x)
    with pytest.raises(PlanError, match=r"member 1 is not the network.*\n.*stem\.weight"):
        fxfuse.build(plan, [members[0], members[2]], x)
    with pytest.raises(PlanError, match="it is the plan's member 1"):
        fxfuse.build(plan, members[1::-1], x)
    with torch.no_grad():
        members[1].block2.bn2.bias[3] += 0.1
    with pytest.raises(PlanError, match="member 1 is not the network that the plan") as caught:
        fxfuse.build(plan, members[:2], x)
    assert caught.value.where == "block2.bn2.bias"
    assert caught.value.why.startswith("1 of ")
    other = [SmallResNet(width=4).eval() for _ in range(2)]
    with pytest.raises(PlanError, match=r"member 0.*\n.*stem\.weight"):
        fxfuse.build(plan, other, x)


def test_a_tensor_that_only_one_side_has_is_named() -> None:
    def member(seed: int, bias: bool) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 8, bias=bias), nn.ReLU(), nn.Linear(8, 2)).eval()

    x = torch.randn(3, 4)
    plan = fxfuse.fuse([member(i, True) for i in range(2)], x).plan
    with pytest.raises(PlanError, match=r"only the plan has 0\.bias"):
        fxfuse.build(plan, [member(i, False) for i in range(2)], x)


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
    with pytest.raises(PlanError, match="does not identify its members"):
        fxfuse.build(unknown, resnets(2), images())


@pytest.mark.parametrize("schema", [1, 2, 3, 5, "4", None, [[]]])
def test_a_plan_of_another_schema_is_to_be_made_again(
    plan: fxfuse.FusionPlan, schema: object
) -> None:
    text = json.dumps(json.loads(plan.to_json()) | {"schema": schema})
    with pytest.raises(
        PlanError, match=r"unknown plan schema .*, expected 4(.|\n)*make the plan again"
    ):
        fxfuse.FusionPlan.from_json(text)


def signed(value: dict[str, Any]) -> str:
    """A plan's text with the digest that fits it."""
    content = {k: v for k, v in value.items() if k not in ("note", "digest")}
    return json.dumps({**content, "digest": digest_of(content)})


@pytest.fixture(scope="module")
def varied_plan() -> fxfuse.FusionPlan:
    """With a map that is a matrix, a frozen part, notes and members of several widths."""

    def member(seed: int, width: int) -> nn.Module:
        torch.manual_seed(seed)
        layers = [nn.Linear(4, width), nn.LayerNorm(width), nn.Linear(width, 6), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(6, 2)).eval()

    members = [member(0, 5), member(1, 4)]
    plan = fxfuse.fuse(
        members, torch.randn(3, 4), verify=False, constraints=Constraints(freeze="4.bias")
    ).plan
    units = [(i, u) for i, count in enumerate((5, 4)) for u in range(count)]
    entries = np.array([(t, i, u) for t in range(5) for i, u in units]).T
    matrix = UnitMap(plan.maps[0].group, 5, *entries, *np.random.default_rng(0).random((2, 45)))
    return replace(plan, maps=(matrix, replace(plan.maps[1], kept="a reason")))


@pytest.mark.parametrize(
    ("path", "value", "why"),
    [
        (("maps", 0, "n_units"), 0, "maps[0].n_units is 0, and not between 1 and 10,000,000"),
        (("maps", 0, "n_units"), -8, "maps[0].n_units is -8"),
        (("maps", 0, "n_units"), 10**30, "and not between 1 and"),
        (("maps", 0, "n_units"), 8.0, "maps[0].n_units is 8.0, and not an integer"),
        (("maps", 0, "n_units"), True, "maps[0].n_units is True, and not an integer"),
        (("maps", 0, "n_units"), 7, "fused unit 7 of 7, counted from 0"),
        (("maps", 0, "n_units"), 10**7, "fused units of 'stem.weight:0' are made of nothing"),
        (("maps", 0, "group"), None, "maps[0].group is None, and not a text"),
        (("maps", 0, "group"), "block1.conv1.weight:0", "has 2 maps"),
        (("maps", 0, "unit"), [0], "maps[0] has lists of different lengths"),
        (("maps", 0, "unit", 0), -1, "maps[0].unit holds -1, which is not an integer from 0 on"),
        (("maps", 0, "unit", 0), 2**63, "maps[0].unit holds"),
        (("maps", 0, "unit", 0), 1.5, "maps[0].unit holds 1.5"),
        (("maps", 0, "unit", 0), 2**70, "maps[0].unit holds 118"),
        (("maps", 0, "unit", 0), "3", "maps[0].unit holds '3'"),
        (("maps", 0, "unit", 0), True, "maps[0].unit holds True"),
        (("maps", 0, "n_units"), 3_000_000_000, "and not between 1 and"),
        (("maps", 0, "member", 0), 2, "has member 2 of 2, counted from 0"),
        (("maps", 0, "weight"), float("nan"), "maps[0].weight is nan, and not a finite number"),
        (("maps", 0, "weight"), 10**400, "maps[0].weight is 1000"),
        (("maps", 0, "units"), [2**62, 2**62], "maps[0] has the unknown entry 'member'"),
        (("maps", 0), [], "maps[0] is a list, and not an object"),
        (("maps", 0, "kept"), 1, "maps[0].kept is 1, and not a text"),
        (("maps",), {}, "maps is an object, and not a list"),
        (("members",), [], "it has no members"),
        (("members", 0, "units"), {"stem.weight:0": -1}, "member 0 has -1 units"),
        (("members", 0, "tensors", "stem.weight"), 3, "members[0].tensors['stem.weight'] is 3"),
        (("members", 0, "hash"), "", "members[0] has the unknown entry 'hash'"),
        (("roles", "stem.weight", "kind"), "lost", "is 'lost', and none of mapped, averaged"),
        (("roles", "stem.weight", "spread"), -1, "has the spread -1"),
        (("roles", "stem.weight", "spread"), float("nan"), "spread"),
        (("roles", "stem.weight", "member"), 0, "is mapped, and its member is 0"),
        (("roles", "stem.weight", "absent_in"), [2], "is absent in member 2 of 2"),
        (("roles", "stem.weight", "absent_in"), [0, 0], "is absent in one member twice"),
        (("roles", "stem.weight"), {}, "roles['stem.weight'] lacks 'kind'"),
        (("constraints", "base_member"), 2, "the base member is member 2 of 2"),
        (("constraints", "base_member"), 99, "the base member is member 99 of 2"),
        (("constraints", "base_member"), -1, "the base member is member -1 of 2"),
        (("constraints", "output_dims"), {"-1": []}, "the key '-1', which is not a number"),
        (("heads", "output"), "sum", "heads.output is 'sum', and none of tuple, concat, union"),
        (("heads",), {"modules": [], "output": "concat"}, "needs heads, but no module is one"),
        (("heads", "classes"), [["a"], ["a"]], "contradict each other"),
        (("mixing", "mode"), "both", "mixing.mode is 'both', and none of joint, per_member"),
        (("surprise",), 1, "the plan has the unknown entry 'surprise'"),
    ],
)
def test_what_is_no_plan_is_named(
    plan: fxfuse.FusionPlan, path: tuple[str | int, ...], value: object, why: str
) -> None:
    content = json.loads(plan.to_json())
    place: Any = content
    for key in path[:-1]:
        place = place[key] if isinstance(key, int) else place.setdefault(key, {})
    place[path[-1]] = value
    with pytest.raises(PlanError, match="this is not a fusion plan") as caught:
        fxfuse.FusionPlan.from_json(signed(content))
    assert why in caught.value.why


def test_a_plan_of_an_unknown_method_is_named(plan: fxfuse.FusionPlan) -> None:
    content = json.loads(plan.to_json()) | {"method": "nobody"}
    with pytest.raises(OptionError, match="unknown method 'nobody'"):
        fxfuse.build(fxfuse.FusionPlan.from_json(signed(content)), resnets(2), images())


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", "null", "[" * 100_000, '{"a":' * 100_000, "1" * 5000, f"[{'1,' * (1 << 24)}1]"],
    ids=lambda text: f"{text[:5]} {len(text)}",
)
def test_what_is_no_json_object_is_no_plan(text: str) -> None:
    with pytest.raises(PlanError, match="this is not a fusion plan"):
        fxfuse.FusionPlan.from_json(text)


def test_a_matrix_of_another_size_than_its_units(varied_plan: fxfuse.FusionPlan) -> None:
    content = json.loads(varied_plan.to_json())
    matrix = next(entry for entry in content["maps"] if "units" in entry)
    for name, value, why in (
        ("units", [2**62, 2**62], "is a matrix of"),
        ("n_units", 9_999_999, "is a matrix of"),
        ("weight", {"type": "<f4", "base64": "AADAfw=="}, "is a matrix of 1 entries"),
        ("weight", {"type": "<f4", "base64": "AADA"}, "cannot be read"),
        ("weight", {"type": "<f4", "base64": "?"}, "cannot be read"),
        ("weight", {"type": "<i8", "base64": ""}, "not a matrix of float32 or float64"),
        ("weight", 1.0, "is 1.0, and not an object"),
    ):
        before, matrix[name] = matrix[name], value
        with pytest.raises(PlanError, match=why):
            fxfuse.FusionPlan.from_json(signed(content))
        matrix[name] = before
    assert fxfuse.FusionPlan.from_json(signed(content)).digest == varied_plan.digest


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where every entry of a plan's content stands; of long lists, the first three."""
    pairs = list(value.items()) if isinstance(value, dict) else []
    if isinstance(value, list):
        pairs = list(enumerate(value[:3]))
    return [p for key, v in pairs for p in ((*path, key), *places(v, (*path, key)))]


def test_whatever_is_changed_is_read_or_named(varied_plan: fxfuse.FusionPlan) -> None:
    """Each entry is left out, or replaced by each of these."""
    text = varied_plan.to_json()
    numbers = [-1, 0, 1.5, 2**31, 2**63, -(10**400), float("nan"), float("inf"), 1e308]
    values = [*numbers, None, True, "", "\ud800", [], {}, [[]], {"": None}, [1, 2], "mapped"]
    read = 0
    for path in places(json.loads(text)):
        for value in (places, *values):
            content = json.loads(text)
            place = content
            for key in path[:-1]:
                place = place[key]
            if value is places:
                del place[path[-1]]
            else:
                place[path[-1]] = value
            try:
                plan = fxfuse.FusionPlan.from_json(signed(content))
            except PlanError:
                continue
            read += 1
            assert plan.summary()
            assert repr(plan)
            assert through_json(plan).digest == plan.digest
    assert read


def test_what_a_plan_holds_is_no_option_of_building() -> None:
    held = {"method", "size", "constraints", "heads"}
    assert held <= inspect.signature(fxfuse.fuse).parameters.keys()
    assert not held & inspect.signature(fxfuse.build).parameters.keys()
    assert "plan" not in inspect.signature(fxfuse.fuse).parameters


def test_maps_of_units_that_there_are_not(plan: fxfuse.FusionPlan) -> None:
    members, x = resnets(2), images()
    first, *others = plan.maps
    for entry, what in (
        (replace(first, unit=first.unit + 8), "unit"),
        (replace(first, member=first.member + 1), "member"),
        (replace(first, target=first.target - 1), "fused unit"),
    ):
        with pytest.raises(PlanError, match=f"{what} out of range: must be 0 to"):
            fxfuse.build(replace(plan, maps=(entry, *others)), members, x)
    larger = replace(plan, maps=(replace(first, n_units=17), *others))
    roles = {**plan.roles, "other.weight": plan.roles["stem.weight"]}
    with pytest.raises(PlanError, match="have different coupling groups"):
        fxfuse.build(replace(plan, maps=tuple(others)), members, x)
    with pytest.raises(PlanError, match="more fused units than the members have"):
        fxfuse.build(larger, members, x)
    with pytest.raises(PlanError, match=r"plan's tensors(.|\n)*other\.weight"):
        fxfuse.build(replace(plan, roles=roles), members, x)


def test_a_single_member_needs_a_plan_of_one(plan: fxfuse.FusionPlan) -> None:
    members, x = resnets(2), images()
    with pytest.raises(MemberError, match="fusion needs at least 2 members, got 1"):
        fxfuse.fuse(members[:1], x)
    with pytest.raises(PlanError, match="made for 2 members"):
        fxfuse.build(plan, members[:1], x)


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
