"""Pruning one network: the transplant of one member, and torch-pruning as the reference."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
import torch_pruning
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy

import fxfuse
from fxfuse import Constraints, Example, Heads, Size, Transplant
from fxfuse.errors import (
    InputError,
    MemberError,
    OptionError,
    PlanError,
)
from fxfuse.graph.tensors import tensors_in
from fxfuse.refine import finetune
from fxfuse.verify.check import in_double, inputs_of, relative_error
from tests.models import build, excite, image
from tests.nets import SmallResNet, images, resnets
from tests.options import flat
from tests.strategies import Block, Recipe, is_plain, members_of, recipes


class SmallVGG(nn.Module):
    """Convolutions with BatchNorm, pooling, a flattened map and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((3, 8), (8, 12), (12, 16)):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
        self.features = nn.Sequential(*layers, nn.MaxPool2d(4))
        self.classifier = nn.Sequential(nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x).flatten(1))


def small_vgg() -> nn.Module:
    torch.manual_seed(0)
    return excite(SmallVGG().double(), images(8, torch.float64))


# --- the reference ---


def kept_by_torch_pruning(
    model: nn.Module, x: torch.Tensor, heads: list[str], width: float, degree: int
) -> dict[tuple[str, int], np.ndarray]:
    """For each weight and its dimension 0, the channels that torch-pruning keeps."""
    pruner = torch_pruning.pruner.BasePruner(
        model,
        x,
        importance=torch_pruning.importance.MagnitudeImportance(p=degree),
        pruning_ratio=1 - width,
        global_pruning=False,
        ignored_layers=[model.get_submodule(head) for head in heads],
    )
    names = {id(module): name for name, module in model.named_modules()}
    kept = {}
    for group in pruner.step(interactive=True):
        for dependency, channels in group:
            layer = dependency.layer
            writes = pruner.DG.is_out_channel_pruning_fn(dependency.pruning_fn)
            if writes and isinstance(layer, nn.Conv2d | nn.Linear):
                every = np.arange(layer.weight.shape[0])
                kept[(f"{names[id(layer)]}.weight", 0)] = np.setdiff1d(every, channels)
    return kept


@pytest.mark.parametrize(("score", "degree"), [("l2", 2), ("l1", 1)])
@pytest.mark.parametrize(("name", "head"), [("vgg", "classifier.2"), ("resnet18", "fc")])
def test_the_channels_that_torch_pruning_keeps(
    name: str, head: str, score: str, degree: int
) -> None:
    model = small_vgg() if name == "vgg" else build(name)
    x = images(2, torch.float64) if name == "vgg" else image()
    result = fxfuse.prune(model, x, verify=False, size=0.5, method=Transplant(score=score))
    ours = {}
    for group in result.graph.groups:
        units = result.plan.map_of(group.name).unit
        for place, rows in group.index.items():
            ours[place] = np.sort(rows[units].reshape(-1))
    theirs = kept_by_torch_pruning(model, x, [head], 0.5, degree)
    weights = [n for n, p in model.named_parameters() if p.dim() > 1 and not n.startswith(head)]
    assert {name for name, _ in theirs} == set(weights)
    for place, channels in theirs.items():
        assert np.array_equal(ours[place], channels), place


# --- the transplant of one network ---


@pytest.mark.parametrize("width", [0.5, 0.75])
def test_pruning_the_wide_model_is_fusing(width: float) -> None:
    """The best units of all members are the best units of their concatenation."""
    members, x = resnets(2, torch.float64), images(dtype=torch.float64)
    wide = fxfuse.fuse(members, x, size=2)
    pruned = fxfuse.prune(wide.module, x, plan=wide.plan, size=width)
    fused = fxfuse.fuse(members, x, size=2 * width)
    assert pruned.plan.sizes() == fused.plan.sizes()
    torch.testing.assert_close(pruned.module(x), fused.module(x), rtol=1e-10, atol=1e-12)
    assert not torch.allclose(pruned.module(x), wide.module(x))


@settings(suppress_health_check=list(HealthCheck), deadline=None, max_examples=10)
@given(recipes(), st.sampled_from([0.25, 0.5, 0.75]))
@example(Recipe(2, (), "mean", vectors=(Block("picked_parameter", 2, 2, False),)), 0.5)
def test_pruning_the_wide_model_is_fusing_for_random_networks(recipe: Recipe, width: float) -> None:
    assume(is_plain(recipe))
    members = members_of(recipe, 2)
    try:
        fused = fxfuse.fuse(members, verify=False, size=2 * width)
    except (OptionError, PlanError) as error:
        if not re.search("leaves no unit|nothing in this network can be fused", str(error)):
            raise
        assume(False)
    wide = fxfuse.fuse(members, verify=False, size=2)
    args, kwargs = inputs_of(members[0])
    pruned = fxfuse.prune(
        in_double(wide.module), Example(args, kwargs=kwargs), verify=False, size=width
    )
    # Where the wide model is written with a gather, it may have fewer groups than the members.
    assume(pruned.plan.sizes() == fused.plan.sizes())
    with torch.no_grad():
        ours, theirs = (tensors_in(in_double(r.module)(*args, **kwargs)) for r in (pruned, fused))
    assert relative_error(ours, theirs) < 1e-9


def test_rows_and_columns_by_hand() -> None:
    model = small_vgg()
    result = fxfuse.prune(model, images(dtype=torch.float64), size=0.5)
    first = result.plan.map_of("features.0.weight:0").unit
    second = result.plan.map_of("features.3.weight:0").unit
    assert (len(first), len(second)) == (4, 6)
    expected = model.features[3].weight[second][:, first]
    assert torch.equal(result.module.get_parameter("features.3.weight"), expected)
    expected = model.features[4].running_var[second]
    assert torch.equal(result.module.state_dict()["features.4.running_var"], expected)


def test_width_one_is_the_network() -> None:
    model, x = small_vgg(), images(dtype=torch.float64)
    result = fxfuse.prune(model, x, size=1)
    torch.testing.assert_close(result.module(x), model(x))
    assert result.verification.passed


def test_the_network_stays_as_it_was() -> None:
    model, x = resnets(1)[0].train(), images()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fxfuse.prune(model, x, size=0.5)
    assert model.training
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_a_pruning_plan_is_applied_again() -> None:
    (model, other), x = resnets(2), images()
    first = fxfuse.prune(model, x, size=0.5)
    plan = fxfuse.FusionPlan.from_json(first.plan.to_json())
    again = fxfuse.build(plan, [model], x)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    with pytest.raises(PlanError, match="member 0"):
        fxfuse.build(plan, [other], x)


def test_what_was_frozen_in_the_fusion_stays_so() -> None:
    members, x = resnets(2), images()
    wide = fxfuse.fuse(members, x, size=2, constraints=Constraints(ignore="block1"))
    frozen = wide.module.state_dict()["block1.conv1.weight"]
    pruned = fxfuse.prune(wide.module, x, plan=wide.plan, size=0.5)
    assert torch.equal(pruned.state_dict()["block1.conv1.weight"], frozen)
    assert pruned.plan.members[0].plan == wide.plan.digest
    more = fxfuse.prune(
        wide.module, x, plan=wide.plan, size=0.5, constraints=Constraints(freeze="stem.*")
    )
    assert more.plan.constraints.ignore == ("block1",)
    assert more.plan.constraints.freeze == ("stem.*",)
    assert fxfuse.prune(wide.module, x, size=0.5).plan.members[0].plan == ""


def test_budgets_and_patterns() -> None:
    model, x = resnets(1)[0], images()
    whole = sum(p.numel() for p in model.parameters())
    small = fxfuse.prune(model, x, size=Size(max_params=whole // 2)).module
    assert 0.3 * whole < sum(p.numel() for p in small.parameters()) <= whole // 2
    module = fxfuse.prune(model, x, size={"block1.*": 0.5}).module
    assert module.get_parameter("block1.conv1.weight").shape == (4, 8, 3, 3)
    assert module.get_parameter("stem.weight").shape == (8, 3, 3, 3)


@pytest.mark.parametrize("score", ["obs", "activation", "bn_scale"])
def test_other_scores(score: str) -> None:
    model, x = resnets(1)[0], images()
    given = {} if score == "bn_scale" else {"calibration": images(128)}
    result = fxfuse.prune(model, x, **flat(width=0.5, score=score, **given))
    assert result.plan.options["score"] == score
    assert set(result.plan.sizes().values()) == {4}


def test_obs_removes_what_nobody_misses() -> None:
    """Units with large weights whose activations are always zero."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    with torch.no_grad():
        model[0].weight[:4] *= 10
        model[0].bias[:4] = -1000.0
    calibration = torch.randn(200, 6)
    result = fxfuse.prune(
        model,
        calibration[:4],
        calibration=calibration,
        size=0.5,
        refine=[],
        method=Transplant(score="obs"),
    )
    assert result.plan.maps[0].unit.tolist() == [4, 5, 6, 7]
    torch.testing.assert_close(result.module(calibration), model(calibration))
    assert fxfuse.prune(model, calibration[:4], size=0.5).plan.maps[0].unit.tolist() != [
        4,
        5,
        6,
        7,
    ]


def test_a_wide_model_that_runs_member_by_member_is_pruned() -> None:
    def member(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True, dropout=0.0)
        return nn.Sequential(layer, nn.Flatten(), nn.Linear(80, 3)).eval()

    x = torch.randn(3, 5, 16)
    wide = fxfuse.fuse([member(seed) for seed in range(2)], x, size=2)
    assert wide.plan.mixing.mode == "per_member"
    pruned = fxfuse.prune(wide.module, x, plan=wide.plan, size=0.5)
    assert pruned.verification.passed
    before, after = (sum(p.numel() for p in r.module.parameters()) for r in (wide, pruned))
    assert after < 0.8 * before


def test_a_network_with_several_heads_is_pruned() -> None:
    x = images()
    members = [SmallResNet(classes=3).eval(), SmallResNet(classes=5).eval()]
    fused = fxfuse.fuse(members, x, heads=Heads("fc"))
    pruned = fxfuse.prune(fused.module, x, plan=fused.plan, size=0.5)
    assert [tuple(y.shape) for y in pruned.module(x)] == [(4, 3), (4, 5)]
    assert set(pruned.plan.sizes().values()) == {4}


# --- gradual schedules ---


def test_train_prune_train() -> None:
    torch.manual_seed(0)
    x = torch.randn(256, 3, 8, 8)
    labels = (x.mean((2, 3)) @ torch.randn(3, 4)).argmax(1)
    batches = [(x[i : i + 64], labels[i : i + 64]) for i in range(0, 256, 64)]

    def loss_of(module: nn.Module) -> float:
        with torch.no_grad():
            return float(cross_entropy(module(x), labels))

    members = [SmallResNet() for _ in range(2)]
    for member in members:
        finetune(member, batches, steps=40, progress=False)
    result: Any = fxfuse.fuse(members, x[:4], size=2)
    losses = []
    for width in (0.75, 2 / 3):
        finetune(result.module, batches, steps=30, progress=False)
        result = fxfuse.prune(result.module, x[:4], plan=result.plan, size=width)
        losses.append(loss_of(result.module))
    finetune(result.module, batches, steps=60, progress=False)
    losses.append(loss_of(result.module))
    assert losses[-1] < 0.9 * min(losses[:-1]), losses
    assert set(result.plan.sizes().values()) == {8}
    own = result.load_into(SmallResNet().eval())
    torch.testing.assert_close(own(x), result.module(x))


# --- bad input ---


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({}, OptionError, "needs a size"),
        ({"width": 1.5}, OptionError, r"width must be in \(0, 1\], got 1.5"),
        ({"width": 0}, OptionError, r"width must be in \(0, 1\], got 0"),
        ({"width": float("nan")}, OptionError, r"width must be in \(0, 1\], got nan"),
        ({"width": 0.5, "max_params": 100}, OptionError, "width and a budget contradict"),
        ({"max_flops": 1}, OptionError, "no width meets the budget"),
        ({"width": 0.5, "score": "best"}, OptionError, "unknown score 'best'"),
        ({"width": 0.5, "score": "obs"}, InputError, "score 'obs' needs calibration inputs"),
        ({"width": 0.5, "freeze": "nothing"}, OptionError, "matches nothing"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        fxfuse.prune(resnets(1)[0], images(), **flat(**options))


def test_weights_that_are_not_finite() -> None:
    model = resnets(1)[0]
    with torch.no_grad():
        model.stem.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(MemberError, match="member 0 holds weights that are not finite"):
        fxfuse.prune(model, images(), size=0.5)


class Differences(nn.Module):
    """Neighbouring neurons are compared: all of them are one unit."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 32), nn.Linear(31, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        return self.last((y[:, 1:] - y[:, :-1]).tanh())


def test_pruning_that_changes_nothing_warns_and_says_why():
    with pytest.warns(UserWarning, match="100% of a member's weights.*aten.sub"):
        fxfuse.prune(Differences(), torch.randn(2, 6), size=0.5)
