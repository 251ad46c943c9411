"""Wide models whose mixing operators run member by member are the mean of the members, exactly."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fxfuse
from fxfuse import Size, verify
from fxfuse.errors import OptionError, PlanError, RewriteError
from fxfuse.planning.plan import FusionPlan, Mixing
from fxfuse.transform.cost import operations_of, parameters_of
from tests.models import excite, image, torchvision
from tests.nets import mean_of
from tests.options import flat
from tests.strategies import Recipe, members_of, recipes


def seeded(make, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = make().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def wide_of(make, x: torch.Tensor, n: int = 3):
    members = [seeded(make, seed) for seed in range(n)]
    result = fxfuse.fuse(members, x, size=n)
    with torch.no_grad():
        found = result.module(x)
    torch.testing.assert_close(found, mean_of(members, x), rtol=1e-9, atol=1e-9)
    # An oracle that would pass for any input says nothing.
    assert not torch.allclose(found, result.module(x.flip(0)))
    return result


class Attention(nn.Module):
    """A block of a transformer with a norm shared by the heads, and one behind the head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 12)
        self.norm = nn.LayerNorm(12)
        self.qkv = nn.Linear(12, 36)
        self.q_norm = nn.RMSNorm(6)
        self.out = nn.Linear(12, 12)
        self.head = nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 6)).unbind(2)
        q, k, v = self.q_norm(q).transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return self.head(x.mean(1)).softmax(-1)


class Tied(nn.Module):
    """An embedding that is the output layer as well."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 8)
        self.hidden = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids.long().abs() % 7)
        return self.norm(x + self.hidden(x).tanh()) @ self.embed.weight.t()


class Gated(nn.Module):
    """Squeezes all channels into one number, of which each member needs its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.gate = nn.Parameter(torch.ones(1))
        self.last = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x).relu()
        return self.last(y * (y.amax(-1, keepdim=True) * self.gate).sigmoid()).relu()


class Norms(nn.Module):
    """Batch statistics behind a sum over all channels, in train mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 6, 3, padding=1)
        self.norm = nn.GroupNorm(1, 6)
        self.second = nn.Conv2d(6, 6, 3, padding=1)
        self.batch = nn.BatchNorm2d(6)
        self.last = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.first(x)).relu()
        x = self.batch(self.second(x)).relu()
        return self.last(x.flatten(2).std(-1)).log_softmax(-1)


TOKENS = torch.randn(5, 3, 4, dtype=torch.float64)


@pytest.mark.parametrize(
    ("make", "x"),
    [
        (Attention, TOKENS),
        (Tied, torch.arange(10, dtype=torch.float64).reshape(2, 5)),
        (Gated, TOKENS),
        (Norms, torch.randn(3, 2, 4, 4, dtype=torch.float64)),
    ],
)
def test_wide_models_are_the_mean_of_their_members(make, x: torch.Tensor):
    result = wide_of(make, x)
    assert result.plan.mixing.mode == "per_member"
    assert result.plan.inexact() == []
    own = result.plan.names_of("per_member")
    assert own
    names = set(result.state_dict())
    for name in own:
        assert name not in names
        assert {f"members.{i}.{name}" for i in range(3)} <= names
    assert any("wide" in check.name for check in result.verification.checks)
    # All that users do with a module.
    reloaded = pickle.loads(pickle.dumps(result.module))
    torch.testing.assert_close(reloaded(x), result.module(x))
    compiled = torch.compile(result.module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), result.module(x))
    torch.export.export(result.module, (x,))


def test_a_transformer_of_windows():
    """One of many, and a small one: benchmarks/wide.py has the others."""

    def member(seed: int) -> fxfuse.Program:
        torch.manual_seed(seed)
        made = torchvision().models.SwinTransformer
        model = made([4, 4], 24, [2, 2], [2, 4], [4, 4], num_classes=10).double()
        return fxfuse.capture(excite(model.eval(), x), (x,))

    x = image()[:, :, :32, :32]
    members = [member(seed) for seed in range(2)]
    assert verify.concatenation_equals_ensemble(members).tolerance == float("inf")
    check = verify.concatenation_equals_ensemble(members, mixing="per_member")
    assert check.passed, check
    assert check.tolerance == 1e-9


@settings(suppress_health_check=list(HealthCheck), deadline=None, max_examples=20)
@given(recipes())
def test_random_networks(recipe: Recipe):
    check = verify.concatenation_equals_ensemble(members_of(recipe, 2), mixing="per_member")
    assert check.passed, check
    assert check.tolerance == 1e-9


def test_each_member_trains_as_it_would_alone():
    """One step on the mean of the outputs: the wide model's own tensors move as the members' do."""
    x = torch.randn(8, 2, 4, 4, dtype=torch.float64)
    members = [seeded(Norms, seed) for seed in range(2)]
    wide = fxfuse.fuse(members, x, size=2).module.train()
    alone = [copy.deepcopy(member).train() for member in members]
    torch.stack([member(x) for member in alone]).mean(0).square().sum().backward()
    wide(x).square().sum().backward()
    for i, member in enumerate(alone):
        for name in ("norm.weight", "norm.bias"):
            found = wide.get_parameter(f"members.{i}.{name}").grad
            torch.testing.assert_close(found, member.get_parameter(name).grad)
    counted = [n for n in wide.state_dict() if n.endswith("num_batches_tracked")]
    assert counted
    assert all(int(wide.state_dict()[n]) == 1 for n in counted)


def test_the_plan_says_what_runs_apart():
    result = wide_of(Attention, TOKENS)
    text = result.plan.to_json()
    again = FusionPlan.from_json(text)
    assert (again.mixing, again.roles) == (result.plan.mixing, result.plan.roles)
    assert again.mixing.mode == "per_member"
    assert "once for each member" in result.plan.summary()
    half = fxfuse.fuse([seeded(Attention, s) for s in range(2)], TOKENS, size=0.5).plan
    assert half.mixing.mode == "joint"
    assert "an approximation" in half.summary()
    with pytest.raises(PlanError, match="mixing"):
        FusionPlan.from_json(replace(result.plan, mixing=Mixing("sometimes")).to_json())


def test_what_it_costs_is_known_beforehand():
    result = wide_of(Attention, TOKENS)
    sizes = result.plan.sizes()
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        result.module(TOKENS)
    assert counter.get_total_flops() == operations_of(result.graph, sizes, result.plan)
    elements = sum(p.numel() for p in result.module.parameters())
    assert elements == parameters_of(result.graph, sizes, result.plan)


def test_joint_mixing_can_be_asked_for():
    members = [seeded(Attention, s) for s in range(2)]
    joint = fxfuse.fuse(members, TOKENS, size=Size(2, mixing="joint"))
    assert joint.plan.mixing.mode == "joint"
    assert joint.plan.inexact()
    assert not torch.allclose(joint.module(TOKENS), mean_of(members, TOKENS))


def test_the_wide_method_keeps_everything():
    members = [seeded(Attention, s) for s in range(2)]
    result = fxfuse.fuse(members, TOKENS, method="concatenate")
    torch.testing.assert_close(result.module(TOKENS), mean_of(members, TOKENS))
    with pytest.raises(OptionError, match="keeps every unit"):
        fxfuse.fuse(members, TOKENS, size=1, method="concatenate")


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"width": 1}, "does not keep every unit"),
        ({}, "needs a width that keeps every unit"),
        ({"width": 2, "freeze": "head.*"}, "one tensor for all members"),
        ({"width": 2, "mixing": "sometimes"}, "sometimes"),
    ],
)
def test_members_run_apart_only_where_all_of_them_is_kept(options, why: str):
    members = [seeded(Attention, s) for s in range(2)]
    with pytest.raises(OptionError, match=why):
        fxfuse.fuse(members, TOKENS, **flat(**({"mixing": "per_member"} | options)))


class Counts(nn.Module):
    """Answers with a number of which there is no mean."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 5)
        self.last = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x).relu()).argmax(-1)


def test_outputs_without_a_mean_are_refused():
    members = [seeded(Counts, s) for s in range(2)]
    with pytest.raises(RewriteError, match="has no mean"):
        fxfuse.fuse(members, TOKENS, size=2)


class Members(nn.Module):
    """Uses the name under which members' own tensors would stand."""

    def __init__(self) -> None:
        super().__init__()
        self.members = nn.ModuleList([nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.members:
            x = layer(x)
        return x


def test_names_of_the_network_are_not_taken():
    names = wide_of(Members, TOKENS).state_dict()
    assert "members_.2.members.1.weight" in names
    assert "members.0.weight" in names
