"""What a caller may ask of an analysis: freeze, share, ignore, output_dims."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner, Result

import fxfuse
from fxfuse import Match, Refit, verify
from fxfuse.analysis.constraints import Constraints
from fxfuse.analysis.labels import Kind
from fxfuse.cli.app import app
from fxfuse.errors import OptionError
from fxfuse.members.checkpoint import read_state_dict
from tests.nets import SmallResNet, images, resnets
from tests.options import flat


class Features(nn.Module):
    """Logits, and the channels before them in several shapes."""

    def __init__(self, body: SmallResNet) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        b = self.body
        grid = b.block1(b.bn(b.stem(x)).relu())
        pooled = b.block2(grid).mean((2, 3))
        return {
            "logits": b.fc(pooled),
            "pooled": pooled,
            "grid": grid,
            "twice": torch.cat([pooled, pooled.tanh()], 1),
            "flat": grid.flatten(1),
            "half": pooled[:, :4],
        }


#: Outputs of `Features` by index: the units of all but the logits are free.
FREE = {1: (), 2: (0, 2), 3: (0,), 4: (), 5: ()}


def features(n: int) -> list[nn.Module]:
    return [Features(member).eval() for member in resnets(n, torch.float64)]


class Two(nn.Module):
    """A stem, a scalar, a layer and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 8)
        self.scale = nn.Parameter(torch.rand(()) + 0.5)
        self.inner = nn.Linear(8, 8)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc((self.inner(self.stem(x).relu()) * self.scale).relu())


# --- freeze ---


def test_frozen_parameters_are_exactly_the_hosts():
    members, x = [Two() for _ in range(3)], torch.randn(4, 4)
    result = fxfuse.fuse(
        members, x, constraints=Constraints(freeze=["stem.*", "scale"], base_member=2)
    )
    state = result.module.state_dict()
    for name in ("stem.weight", "stem.bias", "scale"):
        assert torch.equal(state[name], members[2].state_dict()[name])
        assert name in result.plan.names_of("base")
    reason = result.graph.frozen[("stem.weight", 0)]
    assert (reason.kind, reason.why) == (Kind.KEEP_BASE, "asked for: freeze=stem.*")
    # What is coupled follows: the next layer reads the base member's units.
    assert result.graph.frozen[("inner.weight", 1)].kind is Kind.KEEP_BASE
    assert [g.name for g in result.graph.groups] == ["inner.weight:0"]
    units = result.plan.map_of("inner.weight:0")
    for row, (member, unit) in enumerate(zip(units.member, units.unit, strict=True)):
        expected = members[2].inner.weight[unit] if member == 2 else torch.zeros(8)
        assert torch.equal(state["inner.weight"][row], expected)
    assert "asked for: freeze=stem.*" in result.graph.explain("stem.weight", 0)


def test_a_frozen_bias_draws_in_what_it_is_coupled_with():
    members, x = resnets(2), images()
    result = fxfuse.fuse(members, x, constraints=Constraints(freeze="block1.bn1.bias"))
    state = result.module.state_dict()
    frozen = result.graph.frozen
    assert frozen[("block1.conv1.weight", 0)].kind is Kind.KEEP_BASE
    assert frozen[("block1.conv2.weight", 1)].kind is Kind.KEEP_BASE
    assert torch.equal(state["block1.bn1.running_var"], members[0].block1.bn1.running_var)
    assert torch.equal(state["block1.bn1.bias"], members[0].block1.bn1.bias)


def test_a_frozen_head_is_the_hosts_and_no_mean():
    members, x = [Two(), Two()], torch.randn(4, 4)
    result = fxfuse.fuse(members, x, constraints=Constraints(freeze=["fc.*"], base_member=1))
    for name in ("fc.weight", "fc.bias"):
        assert torch.equal(result.state_dict()[name], members[1].state_dict()[name])
    # The base member's head reads the base member's units only.
    assert torch.equal(result.state_dict()["inner.bias"], members[1].inner.bias)
    assert [g.name for g in result.graph.groups] == ["stem.weight:0"]


def test_a_frozen_head_on_a_trunk_that_members_agree_on():
    member = Two()
    other = copy.deepcopy(member)
    with torch.no_grad():
        other.fc.bias += 1
    x = torch.randn(4, 4)
    result = fxfuse.fuse(
        [member, other], x, method="average", constraints=Constraints(freeze=["fc.*"])
    )
    torch.testing.assert_close(result.module(x), member(x))


@pytest.mark.parametrize("pattern", ["stem.*", "scale", "fc.bias"])
def test_copies_averaged_around_a_frozen_part_are_the_network(pattern: str):
    """What reads the base member's units is the base member's alone, and so no mean over N."""
    member, x = Two(), torch.randn(4, 4)
    members = [member, copy.deepcopy(member), copy.deepcopy(member)]
    result = fxfuse.fuse(members, x, method="average", constraints=Constraints(freeze=[pattern]))
    torch.testing.assert_close(result.module(x), member(x))


class PartlySorted(nn.Module):
    """A head that reads units behind an operator without a rule, and others that are free."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(4, 6)
        self.third, self.head = nn.Linear(14, 5), nn.Linear(14, 3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = torch.cat([self.first(x).cumsum(-1), self.second(x).relu()], 1)
        return self.head(h), self.third(h).relu().sum(1)


def test_free_columns_beside_the_hosts_are_a_mean():
    x = torch.randn(4, 4).double()
    assert verify.identity(PartlySorted().double(), x).passed
    members = [PartlySorted(), PartlySorted()]
    result = fxfuse.fuse(members, x.float(), constraints=Constraints(base_member=1))
    weight = result.state_dict()["head.weight"]
    torch.testing.assert_close(weight[:, :8], members[1].head.weight[:, :8])
    units = result.plan.map_of("second.weight:0")
    for place, (member, unit) in enumerate(zip(units.member, units.unit, strict=True)):
        torch.testing.assert_close(
            weight[:, 8 + place], members[member].head.weight[:, 8 + unit] / 2
        )


# --- share ---


def test_a_shared_stem_is_the_mean_and_the_spread_is_listed():
    members = [Two() for _ in range(2)]
    x = torch.randn(4, 4)
    result = fxfuse.fuse(members, x, constraints=Constraints(share=["stem.*"]))
    a, b = (m.stem.weight.detach() for m in members)
    torch.testing.assert_close(result.state_dict()["stem.weight"], (a + b) / 2)
    assert result.plan.roles["stem.weight"].spread == pytest.approx(
        float((a - b).abs().max() / a.abs().max())
    )
    assert result.graph.frozen[("stem.weight", 0)].why == "asked for: share=stem.*"
    units = result.plan.map_of("inner.weight:0")
    for row, (member, unit) in enumerate(zip(units.member, units.unit, strict=True)):
        assert torch.equal(
            result.state_dict()["inner.weight"][row], members[member].inner.weight[unit]
        )


def test_with_one_stem_for_all_the_concatenation_is_the_ensemble():
    members = [Two().double() for _ in range(3)]
    for member in members[1:]:
        member.stem.load_state_dict(members[0].stem.state_dict())
        member.scale.data.copy_(members[0].scale)
    x = torch.randn(4, 4, dtype=torch.float64)
    check = verify.concatenation_equals_ensemble(
        members, x, constraints=Constraints(share=["stem.*"])
    )
    assert check.passed
    assert check.tolerance < 1e-6, check.detail
    members[1].stem.bias.data += 1
    check = verify.concatenation_equals_ensemble(
        members, x, constraints=Constraints(share=["stem.*"])
    )
    assert "stem.bias is averaged" in check.detail


def test_what_members_add_to_a_shared_dimension_is_no_ensemble():
    """The residual stream is shared, and every member's block writes into it."""
    members = resnets(2, torch.float64)
    for member in members[1:]:
        member.stem.load_state_dict(members[0].stem.state_dict())
    constraints = Constraints(share="stem.weight")
    check = verify.concatenation_equals_ensemble(
        members, images(dtype=torch.float64), constraints=constraints
    )
    assert check.tolerance == float("inf")
    assert "asked for: share=stem.weight" in check.detail


# --- ignore ---


def test_ignored_submodules_are_the_hosts():
    members, x = resnets(2), images()
    result = fxfuse.fuse(members, x, constraints=Constraints(ignore=["block1"], base_member=1))
    state, base_member = result.module.state_dict(), members[1].state_dict()
    inside = [name for name in base_member if name.startswith("block1.")]
    assert len(inside) == 12
    for name in inside:
        assert torch.equal(state[name], base_member[name]), name
    assert [g.name for g in result.graph.groups] == ["block2.conv1.weight:0"]
    nested = fxfuse.analyze(members[0], x, constraints=Constraints(ignore=["*.bn1"]))
    assert nested.frozen[("block2.bn1.running_mean", 0)].why == "asked for: ignore=*.bn1"
    assert [g.name for g in nested.groups] == ["stem.weight:0"]


def test_controls_change_nothing_that_is_not_asked_for():
    members, x = resnets(2), images()
    plain = fxfuse.fuse(members, x)
    asked = fxfuse.fuse(members, x, constraints=Constraints(output_dims={0: (1,)}))
    assert asked.plan.constraints == Constraints(output_dims={0: (1,)})
    unasked = replace(asked.plan, constraints=plain.plan.constraints)
    assert unasked.to_json() == plain.plan.to_json()
    for name, tensor in plain.state_dict().items():
        assert torch.equal(asked.state_dict()[name], tensor)


# --- output_dims ---


def test_units_that_are_handed_out_are_permuted_and_put_back():
    x = images(dtype=torch.float64)
    members = features(3)
    assert verify.permutation(members[0], x, constraints=Constraints(output_dims=FREE)).passed
    graph = fxfuse.analyze(members[0], x, constraints=Constraints(output_dims=FREE))
    # The first four channels are handed out once more than the others.
    assert sorted(g.n_units for g in graph.groups) == [4, 4, 8, 8]
    interface = fxfuse.analyze(members[0], x)
    assert sorted(g.n_units for g in interface.groups) == [8, 8]
    partly = fxfuse.analyze(members[0], x, constraints=Constraints(output_dims={**FREE, 2: (1,)}))
    assert sorted(g.n_units for g in partly.groups) == [8, 8]


def test_the_permutation_oracle_looks_at_outputs_whose_units_are_free():
    """Sabotage: a wrong group shows in the handed-out units alone."""

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x).relu())

    graph = fxfuse.analyze(
        Encoder().double(), torch.randn(3, 4).double(), constraints=Constraints(output_dims={0: ()})
    )
    assert [g.name for g in graph.groups] == ["first.weight:0", "second.weight:0"]
    assert verify.permutation_of(graph).passed
    victim = graph.groups[1]
    wrong = {**victim.index, ("second.bias", 0): np.roll(victim.index[("second.bias", 0)], 1, 0)}
    broken = fxfuse.CouplingGroup(victim.name, victim.n_units, wrong)
    graph = replace(graph, groups=(graph.groups[0], broken))
    assert not verify.permutation_of(graph).passed
    assert [g.name for g in verify.wrong_groups(graph)] == ["second.weight:0"]


def test_handed_out_units_of_the_concatenation_are_the_members():
    x = images(dtype=torch.float64)
    members = features(3)
    check = verify.concatenation_equals_ensemble(
        members, x, constraints=Constraints(output_dims=FREE)
    )
    assert check.passed, check
    assert check.tolerance < 1e-6


@pytest.mark.parametrize("width", [0.5, 1.5, 2])
def test_units_that_are_handed_out_follow_the_width(width: float):
    torch.manual_seed(0)
    members = [nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6)) for _ in range(2)]
    x = torch.randn(4, 5)
    result = fxfuse.fuse(members, x, size=width, constraints=Constraints(output_dims={0: ()}))
    shape = (4, int(6 * width))
    assert result.module(x).shape == shape
    check = next(c for c in result.verification.checks if c.name == "output shape")
    assert (check.passed, check.detail) == (True, str(shape))
    if width < 1:
        pruned = fxfuse.prune(
            members[0], x, size=width, constraints=Constraints(output_dims={0: ()})
        )
        assert pruned.module(x).shape == shape
        with pytest.raises(OptionError, match="matching does not work where outputs are free"):
            fxfuse.fuse(
                members,
                x,
                calibration=torch.randn(100, 5),
                refine=[Refit(), Match()],
                constraints=Constraints(output_dims={0: ()}),
            )


def test_a_fused_feature_extractor_hands_out_the_units_of_the_plan():
    """Half of each member's units are dead, so fusion keeps exactly the living ones."""

    class Extractor(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x).relu()

    members = [Extractor(), Extractor()]
    for member in members:
        with torch.no_grad():
            member.layer.weight[3:] = 0
    x = torch.randn(5, 4)
    result = fxfuse.fuse(members, x, constraints=Constraints(output_dims={0: ()}))
    units = result.plan.map_of("layer.weight:0")
    assert set(zip(units.member, units.unit, strict=True)) == {
        (m, u) for m in (0, 1) for u in range(3)
    }
    found = result.module(x)
    for column, (member, unit) in enumerate(zip(units.member, units.unit, strict=True)):
        torch.testing.assert_close(found[:, column], members[member](x)[:, unit])


# --- bad input ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"freeze": ["stam.*"]}, r"freeze='stam\.\*' matches nothing"),
        ({"share": ["nothing"]}, "share='nothing' matches nothing"),
        ({"ignore": ["block3"]}, "block1, block2"),
        ({"ignore": ["drop"]}, "no submodule of this path holds a tensor"),
        ({"freeze": ["fc.*"], "share": ["fc.bias"]}, "contradict"),
        ({"ignore": ["fc"], "share": ["fc.bias"]}, "ignore=fc, but also asked for: share=fc"),
        ({"freeze": ["bn.weight"], "share": ["stem.*"]}, "is coupled with"),
        ({"output_dims": {1: (1,)}}, r"output 1, .*\n.*0 \(2 dimensions\)"),
        ({"output_dims": {-1: ()}}, "output -1"),
        ({"output_dims": {0: (2,)}}, "output 0 has no dimension 2"),
    ],
)
def test_bad_options(options: dict[str, object], message: str):
    with pytest.raises(OptionError, match=message):
        fxfuse.analyze(resnets(1)[0], images(), Constraints(**options))
    with pytest.raises(OptionError, match=message):
        fxfuse.fuse(resnets(2), images(), **flat(**options))


CLI_MODEL = """
from torch import nn

def mlp():
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
"""


def test_the_commands_take_the_options(tmp_path, monkeypatch):
    (tmp_path / "controls_models.py").write_text(CLI_MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    sizes = ((5, 8), (8, 6), (6, 3))
    members = []
    for name in ("a", "b"):
        a, b, c = (nn.Linear(*size) for size in sizes)
        members.append(nn.Sequential(a, nn.ReLU(), b, nn.ReLU(), c))
        torch.save(members[-1].state_dict(), f"{name}.pt")
    model = ["--model", "controls_models:mlp", "--input", "5"]

    def invoke(*arguments: str) -> Result:
        return CliRunner().invoke(app, [*arguments, *model])

    asked = ["--freeze", "0.weight", "--freeze", "0.bias"]
    result = invoke("fuse", "a.pt", "b.pt", "--out", "fused", *asked)
    assert result.exit_code == 0, result.output
    state = read_state_dict(tmp_path / "fused" / "fused.safetensors")
    assert torch.equal(state["0.weight"], members[0][0].weight)
    assert torch.equal(state["0.bias"], members[0][0].bias)

    def groups(*options: str) -> list[str]:
        result = invoke("analyze", "--json", *options)
        assert result.exit_code == 0, result.output
        return [group["name"] for group in json.loads(result.stdout)["groups"]]

    assert groups() == ["0.weight:0", "2.weight:0"]
    assert groups("--ignore", "0") == ["2.weight:0"]
    assert groups("--share", "0.*") == ["2.weight:0"]
    assert groups("--output-dims", "0=") == ["0.weight:0", "2.weight:0", "4.weight:0"]
    for wrong in (["--share", "9.*"], ["--output-dims", "1=0"], ["--output-dims", "x"]):
        result = invoke("analyze", *wrong)
        assert result.exit_code == 2
        assert "error: " in result.stderr
