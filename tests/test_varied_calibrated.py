"""What is measured on calibration inputs, for members of different widths."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import fxfuse
from fxfuse import Match, Refit, Regression, Size, Transplant
from fxfuse.activations import elimination, unit_activations
from fxfuse.activations.calibration import CalibrationBatches
from fxfuse.analysis.coupling import analyze
from fxfuse.analysis.multi_width import multi_width
from fxfuse.errors import MemberError, OptionError
from fxfuse.refine import match, refit, repair
from fxfuse.transform.layout import copies_of, place_units
from tests.models import excite, image
from tests.nets import Residual, mean_of
from tests.options import unjudged

X = torch.randn(300, 8)


def mlp(width: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    layers = [nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width + 3), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width + 3, 3)).eval()


class Images(nn.Module):
    """A shortcut, batch statistics, and channels that are flattened with their pixels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, width, 3, stride=8), nn.BatchNorm2d(width)
        self.inner = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.back = nn.Conv2d(2 * width, width, 1)
        self.second = nn.Conv2d(width, 2 * width, 3, stride=4)
        self.head = nn.Linear(2 * width * 4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.first(x)).relu()
        x = (x + self.back(self.inner(x).relu())).relu()
        return self.head(self.second(x).relu().flatten(1))


class Heads(nn.Module):
    """Attention with some heads, whose units are heads."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(8, 12 * heads), nn.Linear(4 * heads, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = torch.stack([x, x.flip(-1), x.roll(3, -1)], 1)
        q, k, v = (
            self.qkv(tokens).unflatten(-1, (3, self.heads, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        )
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.head((tokens + self.out(y.flatten(2))).mean(1))


def excited(make: Callable[[], nn.Module], seed: int, x: torch.Tensor) -> nn.Module:
    torch.manual_seed(seed)
    return excite(make().eval(), x)


IMAGES = image(0, 64, torch.float32)
FAMILIES: dict[str, tuple[list[Callable[[], nn.Module]], torch.Tensor]] = {
    "mlp": ([lambda: mlp(20, 0), lambda: mlp(30, 1), lambda: mlp(25, 2)], X),
    "images": ([lambda: Images(6), lambda: Images(9)], IMAGES),
    "heads": ([lambda: Heads(4), lambda: Heads(6)], X),
}


def members_of(family: str) -> list[nn.Module]:
    make, x = FAMILIES[family]
    return [excited(each, seed, x) for seed, each in enumerate(make)]


def far(module: nn.Module, members: list[nn.Module], x: torch.Tensor) -> float:
    with torch.no_grad():
        return float((module(x) - mean_of(members, x)).square().mean())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("width", [None, 1.5])
def test_a_refit_brings_the_network_closer_to_the_ensemble(family: str, width: float | None):
    members, x = members_of(family), FAMILIES[family][1]
    plain = fxfuse.fuse(members, x[:4], size=width)
    result = fxfuse.fuse(
        members,
        x[:4],
        calibration=unjudged(x),
        size=width,
        refine=[Refit()],
        task=Regression(),
        method=Transplant(score="l2"),
    )
    assert result.refit is not None
    fitted = [fit for fit in result.refit.layers if fit.fitted]
    assert fitted
    assert all(fit.after < fit.before for fit in fitted)
    assert far(result.module, members, x) < 0.7 * far(plain.module, members, x)


def test_a_unit_is_what_it_is_in_its_member():
    members = [mlp(4, 0), mlp(7, 1)]
    program = [fxfuse.capture(member, X[:4]) for member in members]
    graph = multi_width(analyze(program[0]), program, analyze)
    calibration = CalibrationBatches.of(program[0], X)
    found = unit_activations(graph, [c.state() for c in program], calibration)
    inputs = torch.cat([args[0] for args, _ in calibration.batches])
    for member, answers in zip(members, found["0.weight:0"], strict=True):
        with torch.no_grad():
            torch.testing.assert_close(answers, member[:2](inputs))


@pytest.mark.parametrize("score", ["activation", "obs"])
def test_dead_units_go_first(score: str):
    members = [mlp(6, 0), mlp(12, 1)]
    alive = [torch.arange(6) < 2, torch.arange(12) % 3 == 0]
    with torch.no_grad():
        for member, keeps in zip(members, alive, strict=True):
            member[0].weight[~keeps] = 0
            member[0].bias[~keeps] = -1
    result = fxfuse.fuse(members, X[:4], calibration=X, refine=[], method=Transplant(score=score))
    kept = result.plan.map_of("0.weight:0")
    for member in range(2):
        assert set(kept.of_member(member)[1]) == set(alive[member].nonzero().flatten().tolist())


def test_copies_of_a_member_s_units_make_up_for_one_another():
    """The wider member holds the narrow one's units twice: one of each pair is enough."""
    small, large = mlp(5, 0), mlp(10, 1)
    with torch.no_grad():
        large[0].weight.copy_(small[0].weight.repeat(2, 1))
        large[0].bias.copy_(small[0].bias.repeat(2))
    program = [fxfuse.capture(member, X[:4]) for member in (small, large)]
    graph = multi_width(analyze(program[0]), program, analyze)
    states = [c.state() for c in program]
    kept = {
        m: {g.name: torch.arange(g.n_units).numpy() for g in graph.of_member(m).groups}
        for m in range(2)
    }
    units, ranks = elimination(graph, states, CalibrationBatches.of(program[0], X), kept)[
        "0.weight:0"
    ]
    best = units[(-ranks).argsort()[:5]]
    assert {int(unit) % 5 for _, unit in best} == set(range(5))


def test_matching_starts_from_the_fused_network():
    members, x = members_of("mlp"), X
    result = fxfuse.fuse(
        members, x[:4], calibration=x, refine=[Refit(), Match(steps=20)], task=Regression()
    )
    history = result.history
    assert history is not None
    assert {c.name for c in history.starts} == {"member 0"}
    assert history["refitted"].accepted
    assert history["refitted"].judged < history["member 0"].judged
    assert history.chosen.endswith("refitted")


@pytest.mark.parametrize("score", ["taylor", "fisher"])
def test_labelled_inputs_score_every_member_in_its_own_graph(score: str):
    members = [mlp(6, 0), mlp(12, 1)]
    batches = [(X[:100], torch.arange(100) % 3)]
    result = fxfuse.fuse(
        members, X[:4], calibration=batches, refine=[], method=Transplant(score=score)
    )
    assert result.plan.sizes()["0.weight:0"] == 6


def deep(blocks: int, width: int) -> nn.Module:
    return Residual(blocks, 8, width, 9)


def test_members_of_other_depth_are_measured_too():
    members = [excited(lambda: deep(1, 12), 0, X), excited(lambda: deep(2, 16), 1, X)]
    plain = fxfuse.fuse(members, X[:4], calibration=X, refine=[], method=Transplant(score="obs"))
    result = fxfuse.fuse(
        members,
        X[:4],
        calibration=unjudged(X),
        refine=[Refit()],
        task=Regression(),
        method=Transplant(score="obs"),
    )
    assert far(result.module, members, X) < 0.7 * far(plain.module, members, X)


def test_refit_repair_and_match_take_results_of_different_widths():
    members, x = members_of("images"), FAMILIES["images"][1]
    result = fxfuse.fuse(members, x[:4], size=1.5)
    both = fxfuse.fuse(
        members,
        x[:4],
        calibration=unjudged(x),
        size=1.5,
        refine=[Refit()],
        task=Regression(),
        method=Transplant(score="l2"),
    )
    plain = far(result.module, members, x)
    report = refit(result, members, x, task=Regression())
    assert [fit.weight for fit in report.layers if fit.fitted]
    torch.testing.assert_close(result.state_dict(), both.state_dict(), rtol=0, atol=0)
    refitted = far(result.module, members, x)
    match(result.module, members, x, Match(steps=10), task=Regression())
    assert refitted < 0.5 * plain
    assert far(result.module, members, x) < plain
    with pytest.raises(MemberError, match="member 0 is not the network that was fused"):
        refit(result, members[::-1], x)


def test_refit_takes_members_without_a_block():
    members = [excited(lambda: deep(1, 12), 0, X), excited(lambda: deep(2, 16), 1, X)]
    result = fxfuse.fuse(members, X[:4])
    both = fxfuse.fuse(
        members,
        X[:4],
        calibration=unjudged(X),
        refine=[Refit()],
        task=Regression(),
        method=Transplant(score="l2"),
    )
    refit(result, members, X, task=Regression())
    torch.testing.assert_close(result.state_dict(), both.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("width", [None, 0.5, 1.5])
def test_repaired_units_vary_as_they_do_in_their_members(width: float | None):
    members = [mlp(6, 0), mlp(12, 1)]
    result = fxfuse.fuse(members, X[:4], size=Size(width, mixing="joint"))
    report = repair(result, members, X)
    assert report.layers == ("0.weight", "2.weight")
    units = result.plan.map_of("2.weight:0")
    place, layout = ("2.weight", 0), copies_of(result.graph, result.plan.sizes())
    placed = place_units(result.graph, result.plan, place, layout)
    with torch.no_grad():
        each = [member[:3](X) for member in members]
        named = result.module.get_parameter
        hidden = (X @ named("0.weight").T + named("0.bias")).relu()
        found = hidden @ named("2.weight").T + named("2.bias")
    assert sum(map(len, placed.targets)) == units.n_units
    for own, targets, sources in zip(each, placed.targets, placed.sources, strict=True):
        for statistic in (torch.mean, torch.std):
            torch.testing.assert_close(
                statistic(found[:, targets], 0), statistic(own[:, sources], 0), rtol=1e-4, atol=1e-4
            )


def test_what_is_the_mean_already_is_not_repaired():
    members, x = members_of("heads"), FAMILIES["heads"][1]
    with pytest.raises(OptionError, match="nothing to repair"):
        repair(fxfuse.fuse(members, x[:4], size=2), members, x)
