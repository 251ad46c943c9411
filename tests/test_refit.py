"""The closed-form refit, and fusion that works at once."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import fxfuse
from fxfuse import Calibration, Constraints, Match, Refit, Regression, Transplant, verify
from fxfuse.activations import NodeRunner
from fxfuse.activations.calibration import CalibrationBatches
from fxfuse.errors import (
    InputError,
    MemberError,
    OptionError,
)
from fxfuse.planning.plan import UnitMap
from fxfuse.refine import refit
from fxfuse.refine.regression import run
from fxfuse.refine.regression.fit_target import routes_of
from fxfuse.refine.regression.head import fit_head
from fxfuse.refine.regression.solve import Fit, Ridge
from fxfuse.refine.targets import Targets
from tests.nets import Samples, SmallResNet, mean_of
from tests.options import flat, unjudged


class Transformer(nn.Module):
    """Two pre-norm blocks on tokens, mean over the tokens, head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 16)
        layers = [nn.TransformerEncoderLayer(16, 4, 24, 0.0, norm_first=True, batch_first=True)]
        layers.append(copy.deepcopy(layers[0]))
        self.blocks = nn.ModuleList(layers)
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


class Depthwise(nn.Module):
    """Pre-activation norms, depthwise and grouped convolutions, a residual sum of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm, self.deep = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.deep_norm = nn.BatchNorm2d(8)
        self.narrow, self.side = nn.Conv2d(8, 12, 1), nn.Conv2d(8, 12, 1, bias=False)
        self.side_norm = nn.BatchNorm2d(12)
        self.head = nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        y = nn.functional.relu6(self.deep_norm(self.deep(self.norm(x).relu())))
        z = (self.narrow(y) + self.side_norm(self.side(x))).relu()
        return self.head(z.mean((2, 3)))


class Decoder(nn.Module):
    """A code that transposed convolutions unfold into an image, one of them behind a norm."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 10, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(10, 12, 4, stride=2, padding=1, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(12)
        self.out = nn.ConvTranspose2d(12, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.norm(self.up(self.down(x).relu())).relu())


class Crossed(nn.Module):
    """Queries from one sequence, keys and values from another: parts of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 16), nn.Linear(6, 16)
        self.cross = nn.MultiheadAttention(16, 4, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        memory = self.right(x.flip(1)).relu()
        return self.head(self.cross(self.left(x).relu(), memory, memory, need_weights=False)[0])


class Fourier(nn.Module):
    """Tokens mixed by a Fourier transform along both dimensions (FNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(6, 8), nn.LayerNorm(8)
        self.up, self.down, self.head = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.embed(x)
        h = self.norm(h + torch.fft.fft(torch.fft.fft(h, dim=-1), dim=-2).real)
        return self.head((h + self.down(self.up(h).relu())).mean(1))


class PerHead(nn.Module):
    """Values of attention heads, with a convolution over tokens for each head (Nyströmformer)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.values = nn.Linear(6, 12), nn.Linear(12, 8)
        self.out, self.head = nn.Linear(8, 8), nn.Linear(8, 4)
        self.conv = nn.Conv2d(4, 4, (3, 1), padding=(1, 0), groups=4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        v = self.values(self.stem(x).relu()).unflatten(2, (4, 2)).transpose(1, 2)
        v = (v.softmax(2) + self.conv(v)).transpose(1, 2).flatten(2)
        return self.head(self.out(v).relu().mean(1))


class Conditioned(nn.Module):
    """Features that a second input shifts through two linear layers (a time embedding)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.first, self.second, self.head = nn.Linear(5, 12), nn.Linear(12, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        h = self.stem(x) + self.second(self.first(t).relu())[:, :, None, None]
        return self.head(self.conv(h.relu()).relu().mean((2, 3)))


NETWORKS = {
    "ResNet": (SmallResNet, (3, 16, 16)),
    "transformer": (Transformer, (5, 6)),
    "depthwise": (Depthwise, (3, 8, 8)),
    "decoder": (Decoder, (3, 8, 8)),
}
#: Networks with a layer of another kind, of which one tensor is lost.
LOST = {
    "decoder": ("up.weight", Decoder, (3, 8, 8)),
    "grouped decoder": ("up.weight", lambda: Decoder(2), (3, 8, 8)),
    "crossed": ("cross.in_proj_weight", Crossed, (5, 6)),
}


SAMPLES = Samples({**NETWORKS, **{name: case[1:] for name, case in LOST.items()}}, 300)
inputs_for, members_for = SAMPLES.inputs, SAMPLES.members


def distance(module: nn.Module, members: list[nn.Module], x: torch.Tensor) -> float:
    """Mean squared difference from the ensemble, relative to its outputs' variance."""
    wanted = mean_of(members, x)
    with torch.no_grad():
        return float((module(x) - wanted).square().mean() / wanted.var(0).mean())


@pytest.mark.parametrize("name", NETWORKS)
def test_a_refit_brings_the_fused_network_close_to_the_ensemble(name: str):
    members, x = members_for(name), inputs_for(name)
    result = fxfuse.fuse(members, x[:4])
    fresh = inputs_for(name, 200, seed=9)
    before = distance(result.module, members, fresh)
    report = refit(result, members, x, task=Regression())
    after = distance(result.module, members, fresh)
    assert after < 0.5 * before, (before, after)
    assert report.inputs == 300
    assert {fit.weight for fit in report.layers if fit.fitted}


@pytest.mark.parametrize("network", [Fourier, PerHead, Conditioned])
def test_no_layer_gets_worse_behind_operators_of_every_kind(network: type[nn.Module]):
    torch.manual_seed(0)
    members = [network().eval() for _ in range(2)]
    shapes = [(3, 6, 6), (5,)] if network is Conditioned else [(5, 6)]
    x = tuple(torch.randn(64, *shape) for shape in shapes)
    result = fxfuse.fuse(members, tuple(t[:4] for t in x))
    report = refit(result, members, x)
    assert all(fit.after <= fit.before for fit in report.layers), report.layers
    assert sum(fit.fitted for fit in report.layers) > len(report.layers) / 2


@pytest.mark.parametrize("name", NETWORKS)
def test_no_layer_gets_worse_on_the_sample(name: str):
    members, x = members_for(name), inputs_for(name)
    report = refit(fxfuse.fuse(members, x[:4]), members, x)
    assert all(fit.after <= fit.before for fit in report.layers), report.layers
    assert all(fit.fitted == (fit.why == "") for fit in report.layers)


@pytest.mark.parametrize("name", NETWORKS)
def test_what_the_student_can_represent_is_kept(name: str):
    """Identical members: the fused network is the member, and stays it."""
    members, x = members_for(name, same=True), inputs_for(name)
    result = fxfuse.fuse(members, x[:4], method="average")
    refit(result, members, x)
    assert distance(result.module, members, inputs_for(name, seed=5)) < 1e-8


def test_a_shuffled_layer_is_found_again():
    """A layer with random weights between layers of the member is regressed to the member's."""
    members, x = members_for("ResNet", same=True), inputs_for("ResNet")
    result = fxfuse.fuse(members, x[:4], method="average")
    with torch.no_grad():
        weights = dict(result.module.named_parameters())
        name = next(n for n, w in weights.items() if w.dim() == 4 and w.shape[1] > 3)
        weights[name].copy_(torch.randn_like(weights[name]))
    assert distance(result.module, members, x) > 1e-2
    refit(result, members, x, Refit(alpha=1e-7))
    assert distance(result.module, members, inputs_for("ResNet", seed=5)) < 1e-5


@pytest.mark.parametrize("name", LOST)
def test_a_lost_layer_is_found_again(name: str):
    """Also where little memory makes the activations go to files and back."""
    members, x, tensor = members_for(name, same=True), inputs_for(name), LOST[name][0]
    result = fxfuse.fuse(members, x[:4], method="average")
    with torch.no_grad():
        weights = dict(result.module.named_parameters())
        weights[tensor].copy_(torch.randn_like(weights[tensor]))
    assert distance(result.module, members, x) > 1e-2
    report = refit(result, members, x, Refit(alpha=1e-7, memory=0))
    assert distance(result.module, members, inputs_for(name, seed=5)) < 1e-5
    assert {fit.weight for fit in report.layers if fit.fitted} >= {tensor}
    assert tensor not in report.left


def test_train_mode_agrees_with_eval_mode():
    """Statistics written through a batch norm are those of the new outputs."""
    members, x = members_for("ResNet"), inputs_for("ResNet")
    result = fxfuse.fuse(members, x[:4])
    report = refit(result, members, x)
    before = {name: t.clone() for name, t in result.module.named_buffers()}
    with torch.no_grad():
        result.module.train()(x)
    after = dict(result.module.named_buffers())
    norms = [f.weight for f in report.layers if f.fitted and "conv" in f.weight]
    assert len(norms) == 4
    for name in norms:
        prefix = name.replace("conv", "bn").removesuffix("weight")
        mean, variance = (before[f"{prefix}running_{kind}"] for kind in ("mean", "var"))
        # Train mode moves statistics a tenth of the way to those of the batch.
        batch = [
            (after[f"{prefix}running_{k}"] - 0.9 * before[f"{prefix}running_{k}"]) / 0.1
            for k in ("mean", "var")
        ]
        # Only a sample of the rows was fitted on.
        assert float(((batch[0] - mean).abs() / variance.sqrt()).max()) < 0.1
        assert float((batch[1] / variance - 1).abs().max()) < 0.2


def test_the_routes_of_a_residual_network():
    graph = fxfuse.analyze(members_for("ResNet", 1)[0], inputs_for("ResNet", 4))
    routes = {route.layer.weight: route for route in routes_of(graph.program)}
    added = [r for r in routes.values() if r.skip is not None]
    assert added
    assert all("add" in r.aim.name and r.cut == (0.0, float("inf")) for r in added)
    assert {w for w, r in routes.items() if r.norm is None} == {"fc.weight"}


def test_two_layers_of_one_sum_are_partners():
    graph = fxfuse.analyze(members_for("depthwise", 1)[0], inputs_for("depthwise", 4))
    routes = {route.layer.weight: route for route in routes_of(graph.program)}
    last = routes["side.weight"]
    assert last.partner is not None
    assert last.partner.layer.weight == "narrow.weight"
    assert routes["narrow.weight"].skip is None


@pytest.mark.parametrize("cast", [False, True])
def test_the_way_through_movements_and_scales(cast: bool):
    """A branch that is permuted, scaled or cast before the sum is fitted to what the sum needs."""

    class Moved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.branch = nn.Linear(6, 10), nn.Linear(10, 10)
            self.scale, self.head = nn.Parameter(torch.rand(10) + 0.5), nn.Linear(10, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x)
            branch = self.branch(x.relu())
            branch = branch.double().float() if cast else branch
            moved = branch.transpose(1, 2).roll(1, 2).reshape(len(x), 5, 2, -1)
            y = moved.reshape(len(x), 10, -1).transpose(1, 2) * self.scale
            return self.head((x + y).relu().mean(1))

    members, x = [Moved().eval() for _ in range(2)], torch.randn(300, 7, 6)
    result = fxfuse.fuse(members, x[:4])
    report = refit(result, members, x, task=Regression())
    fits = {fit.weight: fit for fit in report.layers}
    assert "add" in fits["branch.weight"].aim
    assert fits["branch.weight"].after < 0.7 * fits["branch.weight"].before


def test_ridge_is_least_squares_and_its_dual_the_same():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(40, 2, 7, generator=generator)
    wanted = torch.randn(40, 6, generator=generator)
    fit = Ridge(rows, centred=True).fit(wanted, 1e-9)
    for group in range(2):
        a = torch.cat([rows[:, group], torch.ones(40, 1)], 1)
        expected = torch.linalg.lstsq(a, wanted[:, 3 * group : 3 * group + 3]).solution
        torch.testing.assert_close(fit.matrix[group], expected[:7], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(fit.shift[group], expected[7], rtol=1e-3, atol=1e-4)
    wide = torch.randn(12, 1, 30, generator=generator)
    ridge = Ridge(wide, centred=False)
    assert ridge.dual
    a, z = wide[:, 0].double(), wanted[:12, :3].double()
    gram = a.T @ a / 12
    gram += 0.1 * gram.diagonal().mean() * torch.eye(30)
    expected = torch.linalg.solve(gram, a.T @ z / 12)
    torch.testing.assert_close(ridge.fit(wanted[:12, :3], 0.1).matrix[0], expected.float())


@pytest.mark.parametrize("features", [7, 60])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_trial_is_the_regression_on_the_rows_that_are_not_held_out(features: int, weighted: bool):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(50, 2, features, generator=generator) + 3
    wanted = torch.randn(50, 6, generator=generator)
    weights = torch.rand(50, generator=generator) + 0.1 if weighted else None
    held = torch.arange(50) >= 40
    both = Ridge(rows, centred=True, weights=weights, held=held)
    own = None if weights is None else weights[:40]
    alone = Ridge(rows[:40], centred=True, weights=own)
    every = Ridge(rows, centred=True, weights=weights)
    assert both.dual == (features > 50)
    for found, expected in (
        (both.trial(wanted, 1e-2), alone.fit(wanted[:40], 1e-2)),
        (both.fit(wanted, 1e-2), every.fit(wanted, 1e-2)),
    ):
        torch.testing.assert_close(found.matrix, expected.matrix, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.shift, expected.shift, rtol=1e-3, atol=1e-4)


def test_a_row_of_weight_two_counts_as_two_rows():
    generator = torch.Generator().manual_seed(0)
    rows, wanted = torch.randn(30, 1, 5, generator=generator), torch.randn(30, 2)
    weights = torch.tensor([2.0] * 10 + [1.0] * 10 + [0.0] * 10)
    twice = torch.cat([rows[:20], rows[:10]])
    weighted = Ridge(rows, centred=True, weights=weights).fit(wanted, 1e-9)
    expected = Ridge(twice, centred=True).fit(torch.cat([wanted[:20], wanted[:10]]), 1e-9)
    torch.testing.assert_close(weighted.matrix, expected.matrix, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weighted.shift, expected.shift, rtol=1e-4, atol=1e-5)


def test_ridge_on_features_that_never_vary():
    rows = torch.zeros(20, 1, 5)
    fit = Ridge(rows, centred=True).fit(torch.ones(20, 2), 1e-3)
    assert torch.isfinite(fit.matrix).all()
    torch.testing.assert_close(fit(rows), torch.ones(20, 2))


@pytest.mark.parametrize("alpha", [1e-14, 1e-8])
def test_a_singular_system_gets_a_larger_ridge(alpha: float):
    """Fifteen features of five, with a ridge that float32's rounding swallows."""
    generator = torch.Generator().manual_seed(0)
    few = torch.randn(400, 1, 5, generator=generator)
    rows, wanted = few @ torch.randn(5, 15, generator=generator), few[:, 0, :3]
    fit = Ridge(rows, centred=True).fit(wanted, alpha)
    assert float((fit(rows) - wanted).abs().max()) < 1e-3 * float(wanted.abs().max())


def test_a_gram_matrix_that_is_not_finite_is_refused():
    with pytest.raises(InputError, match="overflow float32"):
        Ridge(torch.full((4, 1, 3), 1e30) * torch.arange(4).reshape(4, 1, 1), centred=False)


def test_the_head_is_fitted_to_probabilities():
    generator = torch.Generator().manual_seed(0)
    rows, logits = torch.randn(500, 1, 6, generator=generator), torch.randn(500, 4) * 3
    start = Ridge(rows, centred=True).fit(logits, 1e-3)

    def divergence(fit: Fit) -> float:
        wanted, answer = logits.log_softmax(1), fit(rows).log_softmax(1)
        return float((wanted.exp() * (wanted - answer)).sum(1).mean())

    assert divergence(fit_head(rows, logits, start, 1e-3)) < divergence(start)


def test_a_parameter_that_should_stay_stays():
    members, x = members_for("ResNet"), inputs_for("ResNet")
    name = next(n for n, w in members[0].named_parameters() if w.dim() == 4 and w.shape[1] > 3)
    result = fxfuse.fuse(
        members,
        x[:4],
        calibration=unjudged(x),
        refine=[Refit()],
        constraints=Constraints(freeze=[name]),
        method=Transplant(score="l2"),
    )
    torch.testing.assert_close(result.state_dict()[name], members[0].state_dict()[name])
    assert name in result.refit.left
    fit = next(f for f in result.refit.layers if f.weight == name)
    assert "asked" in fit.why


def test_a_partner_that_should_stay_stays():
    """The other layer of a sum is fitted in turn, but not one that an option keeps."""
    members, x = members_for("depthwise"), inputs_for("depthwise")
    plain = fxfuse.fuse(members, x[:4], constraints=Constraints(freeze=["narrow.bias"]))
    result = fxfuse.fuse(
        members,
        x[:4],
        calibration=unjudged(x),
        refine=[Refit()],
        constraints=Constraints(freeze=["narrow.bias"]),
        method=Transplant(score="l2"),
    )
    torch.testing.assert_close(result.state_dict()["narrow.bias"], members[0].narrow.bias.detach())
    for name in ("narrow.weight", "narrow.bias"):
        torch.testing.assert_close(result.state_dict()[name], plain.state_dict()[name])
        assert name in result.refit.left
    assert next(fit for fit in result.refit.layers if fit.weight == "side.weight").fitted


def test_two_layers_of_one_sum_are_one_regression(monkeypatch: pytest.MonkeyPatch):
    """The sum of both is the least-squares fit on the inputs of both, side by side."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(6, 10)
            self.wide, self.slim = nn.Linear(10, 12), nn.Linear(6, 12, bias=False)
            self.head = nn.Linear(12, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.wide(self.stem(x).tanh()) + self.slim(x))

    members, x = [Two().eval() for _ in range(2)], torch.randn(300, 6)
    result = fxfuse.fuse(members, x[:4])
    # So that rows count alike, as in the least squares that it is compared with.
    monkeypatch.setattr(run, "Sensitivity", lambda *_: None)
    report = refit(result, members, x, Refit(alpha=1e-9), task=Regression())
    fits = {fit.weight: fit for fit in report.layers}
    assert {fits[n].aim for n in ("wide.weight", "slim.weight")} == {"add"}
    assert fits["wide.weight"].after == fits["slim.weight"].after < fits["wide.weight"].before
    state = result.module.state_dict()
    read = (x @ state["stem.weight"].T + state["stem.bias"]).tanh()
    found = read @ state["wide.weight"].T + state["wide.bias"] + x @ state["slim.weight"].T
    sums = torch.cat([m.wide(m.stem(x).tanh()) + m.slim(x) for m in members], 1).detach()
    (to,) = [m for m in result.plan.maps if m.n_units == 12]
    wanted = sums[:, torch.from_numpy(12 * to.member + to.unit)]
    rows = torch.cat([read, x, torch.ones(300, 1)], 1)
    best = rows @ torch.linalg.lstsq(rows, wanted).solution
    torch.testing.assert_close(found, best, rtol=1e-3, atol=1e-3)


def test_a_norm_that_is_used_twice_is_left():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 10), nn.Linear(10, 10)
            self.norm, self.head = nn.LayerNorm(10), nn.Linear(10, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.norm(self.second(self.norm(self.first(x)))))

    members, x = [Shared().eval() for _ in range(2)], torch.randn(300, 6)
    report = refit(fxfuse.fuse(members, x[:4]), members, x)
    assert {"norm.weight", "norm.bias"} <= set(report.left)


# --- fuse -------------------------------------------------------------------------------------


def test_fuse_refits_and_verifies():
    members, x = members_for("ResNet"), inputs_for("ResNet")
    plain = fxfuse.fuse(members, x[:4], calibration=x, refine=[], method=Transplant(score="obs"))
    result = fxfuse.fuse(
        members, x[:4], calibration=unjudged(x), refine=[Refit()], method=Transplant(score="obs")
    )
    assert distance(result.module, members, x) < 0.5 * distance(plain.module, members, x)
    assert result.plan.options["score"] == "obs"
    assert result.refit is not None
    assert plain.refit is None
    assert all(check.passed for check in result.verification.checks)
    model = result.load_into(copy.deepcopy(members[0]))
    torch.testing.assert_close(model.eval()(x[:8]), result.module(x[:8]))


def test_the_way_goes_on_from_the_fused_network_or_from_a_member():
    """Random networks are as good as specialists: no member is close to their mean."""
    members, x = members_for("ResNet"), inputs_for("ResNet")
    result = fxfuse.fuse(members, x[:4], calibration=x, refine=[Refit(), Match(steps=30)])
    history = result.history
    assert result.plan.method == "transplant"
    assert {c.name for c in history.starts} == {"member 0", "member 1"}
    assert history["refitted"].accepted
    assert history["refitted"].low > 0
    assert history["refitted"].judged < 0.5 * min(c.judged for c in history.starts)
    assert history.chosen.endswith("refitted")
    assert result.plan.options["start"] == "refitted"
    assert str(history).startswith(f"{history.chosen} is returned, judged on 45 inputs")
    assert result.match.steps == 30
    # A member that is the ensemble is chosen, and it is left as it is.
    same = members_for("ResNet", same=True)
    before = {n: t.clone() for n, t in same[0].state_dict().items()}
    result = fxfuse.fuse(same, x[:4], calibration=x, refine=[Refit(), Match(steps=2)])
    assert result.history.chosen.startswith("member")
    assert result.history[result.history.chosen].judged < 1e-6
    for name, tensor in same[0].state_dict().items():
        torch.testing.assert_close(tensor, before[name])
        assert torch.equal(result.state_dict()[name], before[name])


def test_no_network_is_handed_over_that_is_worse_than_its_start():
    members, x = members_for("ResNet", same=True), inputs_for("ResNet")
    with torch.no_grad():
        for tensor in members[1].parameters():
            tensor += 1e-4 * torch.randn_like(tensor)
    result = fxfuse.fuse(members, x[:4], calibration=x, refine=[Refit(), Match(steps=1)])
    history = result.history
    assert history[history.chosen].judged <= min(c.judged for c in history.starts)
    for candidate in history.candidates:
        assert not candidate.accepted or candidate.low > 0


def test_the_way_of_values():
    """A network without class logits is chosen and matched by squared differences."""

    class Values(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 24), nn.Linear(24, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.first(x).relu())

    members, x = [Values() for _ in range(2)], torch.randn(200, 5, 4)
    result = fxfuse.fuse(members, x[:3], calibration=x, refine=[Refit(), Match(steps=10)])
    assert result.history.task == "Regression()"
    assert result.history.unit == "share of the variance"
    assert distance(result.module, members, torch.randn(50, 5, 4)) < 0.2


@pytest.mark.parametrize(
    "options", [{"refit": True, "match": True}, {"refit": True}, {"score": "obs"}]
)
def test_calibration_is_asked_for(options: dict[str, object]):
    with pytest.raises(InputError, match="needs calibration inputs") as caught:
        fxfuse.fuse(members_for("ResNet"), inputs_for("ResNet", 4), **flat(**options))
    assert "calibration=" in caught.value.how


def test_steps_have_an_order():
    members, x = members_for("ResNet"), inputs_for("ResNet")
    for steps in ([Match(), Refit()], [Refit(), Refit()], ["refit"]):
        with pytest.raises(OptionError, match="not a sequence of steps"):
            fxfuse.fuse(members, x[:4], calibration=x, refine=steps)


def test_other_members_than_those_that_were_fused():
    members, x = members_for("ResNet"), inputs_for("ResNet")
    result = fxfuse.fuse(members, x[:4])
    with pytest.raises(MemberError, match="2 members were fused, got 3"):
        refit(result, [*members, members[0]], x)
    with pytest.raises(MemberError, match="member 1 is not the network that was fused"):
        refit(result, [members[0], nn.Linear(2, 2)], x)


def test_kinds_of_output():
    members, x = members_for("ResNet"), inputs_for("ResNet")
    with pytest.raises(OptionError, match="unknown task 'classes'"):
        refit(fxfuse.fuse(members, x[:4]), members, x, task="classes")


def test_a_network_in_float64_is_refitted():
    members = [m.double() for m in members_for("depthwise")]
    x = inputs_for("depthwise").double()
    result = fxfuse.fuse(members, x[:4])
    before = distance(result.module, members, x)
    report = refit(result, members, x, task=Regression())
    assert distance(result.module, members, x) < 0.5 * before
    assert all(fit.after <= fit.before for fit in report.layers)
    assert {t.dtype for t in result.module.parameters()} == {torch.float64}


def test_averaged_units_have_averaged_targets():
    """A map with several entries per unit: the target is the weighted sum of the members' units."""
    members = [nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).eval() for _ in range(2)]
    members[1].load_state_dict(members[0].state_dict())
    x = torch.randn(300, 4)
    result = fxfuse.fuse(members, x[:3], method="average")
    (entry,) = result.plan.maps
    assert isinstance(entry, UnitMap)
    assert np.allclose(entry.weight, 0.5)
    refit(result, members, x)
    assert distance(result.module, members, torch.randn(50, 4)) < 1e-10


def test_the_fused_network_passes_the_oracles_after_a_refit():
    members, x = members_for("transformer"), inputs_for("transformer")
    result = fxfuse.fuse(
        members, x[:4], calibration=unjudged(x), refine=[Refit()], method=Transplant(score="obs")
    )
    graph = fxfuse.analyze(result.module, x[:4])
    assert verify.permutation_of(graph).passed
    assert CalibrationBatches.of(graph.program, x).size == 300


@pytest.mark.parametrize("method", ["transplant", "average"])
def test_an_embedding_is_its_target_already(method: str):
    """It reads the inputs alone, so nothing is left to be fitted; what follows it is."""

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token, self.place = nn.Embedding(11, 12), nn.Parameter(torch.randn(5, 12))
            self.hidden, self.head = nn.Linear(12, 16), nn.Linear(16, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.hidden(self.token(x) + self.place).relu().mean(1))

    members, x = [Tokens().eval() for _ in range(2)], torch.randint(0, 11, (300, 5))
    result = fxfuse.fuse(members, x[:4], method=method)
    program = result.graph.program
    calibration = CalibrationBatches.of(program, x)
    (node,) = (n for n in program.graph.nodes if n.target is torch.ops.aten.embedding.default)
    states = [member.state_dict() for member in members]
    runners = [
        NodeRunner(program, s, calibration, held=[node]) for s in (*states, result.state_dict())
    ]
    for runner in runners:
        runner.run_to(node)
    *values, found = (runner.value(node)[0] for runner in runners)
    torch.testing.assert_close(found, Targets(result.graph, result.plan).merge(node, values))
    report = refit(result, members, x)
    assert "token.weight" in report.left
    assert "hidden.weight" not in report.left or method == "average"


def test_more_inputs_are_taken_when_they_are_allowed():
    """Of data that never repeat themselves more say more; what is left out is spoken of."""
    members = []
    for seed in range(2):
        torch.manual_seed(seed)
        sizes = zip((8, 24, 24), (24, 24, 4), strict=True)
        layers = [layer for size in sizes for layer in (nn.Linear(*size), nn.ReLU())]
        members.append(nn.Sequential(*layers[:-1]).eval())
    x, fresh, found = torch.randn(3000, 8), torch.randn(500, 8), []
    for limit in (100, 3000):
        result = fxfuse.fuse(members, x[:4], verify=False)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            report = refit(result, members, Calibration(x, limit=limit), task=Regression())
        assert report.inputs == limit
        assert any("are used" in str(w.message) for w in caught) == (limit < 3000)
        found.append(distance(result.module, members, fresh))
    assert found[1] < found[0]
