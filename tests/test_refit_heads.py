"""The closed-form refit of a partial fusion: one trunk, and a target of its own for every head."""

from __future__ import annotations

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

import fxfuse
from fxfuse import Heads, Match, Refit, Regression, Transplant
from fxfuse.errors import MemberError, OptionError
from fxfuse.refine import RefitReport, finetune, refit
from tests.nets import SmallResNet, images
from tests.options import flat
from tests.test_partial import HEADS, member, one_trunk, tower

DOUBLE = torch.float64


class Plain(nn.Module):
    """Two trunk layers and a head of one."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 10), nn.Linear(10, 8)
        self.head = nn.Linear(8, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(self.first(x).relu()).tanh())


def plain(n: int = 2) -> list[nn.Module]:
    torch.manual_seed(0)
    return [Plain(3 + i).eval() for i in range(n)]


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Mean squared difference, relative to the variance of what is wanted."""
    return float(((found - wanted).square().mean() / wanted.var(0).mean()).detach())


def no_layer_got_worse(report: RefitReport) -> bool:
    return all(fit.after <= fit.before for fit in report.layers)


@pytest.mark.parametrize("heads", [("fc",), ("block2", "fc")])
def test_members_of_one_trunk_are_left_as_they_are(heads: tuple[str, ...]):
    """What the student can represent is kept: every head answers as its member before and after."""
    members = [member(seed, classes=3 + seed) for seed in range(2)]
    one_trunk(members, heads)
    x = torch.randn(200, 3, 8, 8).double()
    result = fxfuse.fuse(
        members, x[:4], calibration=x, refine=[Refit()], method="average", heads=Heads(heads)
    )
    x = images(dtype=DOUBLE)
    for m, answer in zip(members, result.module(x), strict=True):
        torch.testing.assert_close(answer, m(x), rtol=1e-6, atol=1e-6)


def test_each_head_is_the_regression_of_its_member():
    """From the student's own trunk to the member's logits, by least squares."""
    members, x = plain(3), torch.randn(400, 6)
    result = fxfuse.fuse(members, x[:4], heads=Heads(["head"]))
    report = refit(result, members, x, Refit(alpha=1e-9), task=Regression())
    fits = {fit.weight: fit for fit in report.layers}
    state = result.state_dict()
    read = (x @ state["first.weight"].T + state["first.bias"]).relu()
    read = (read @ state["second.weight"].T + state["second.bias"]).tanh()
    rows = torch.cat([read, torch.ones(400, 1)], 1)
    for i, (m, answer) in enumerate(zip(members, result.module(x), strict=True)):
        best = rows @ torch.linalg.lstsq(rows, m(x)).solution
        torch.testing.assert_close(answer, best, rtol=1e-3, atol=1e-3)
        assert fits[f"heads.{i}.head.weight"].after < fits[f"heads.{i}.head.weight"].before


def test_the_trunk_aims_at_the_kept_units_of_all_members():
    members, x = plain(), torch.randn(400, 6)
    result = fxfuse.fuse(
        members,
        x[:4],
        calibration=x,
        refine=[Refit()],
        method=Transplant(score="l2"),
        heads=Heads(["head"]),
    )
    units = result.plan.map_of("first.weight:0")
    assert set(units.member) == {0, 1}
    state = result.state_dict()
    first = (x @ state["first.weight"].T + state["first.bias"]).relu()
    answers = torch.cat([m.first(x).relu() for m in members], 1)
    wanted = answers[:, torch.from_numpy(10 * units.member + units.unit)]
    # Units that read the inputs alone are represented exactly.
    torch.testing.assert_close(first, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("heads", [("fc",), ("block2", "fc")])
@pytest.mark.parametrize("width", [None, 1.5])
def test_no_layer_gets_worse(heads: tuple[str, ...], width: float | None):
    members = [member(seed, 3 + seed, torch.float32) for seed in range(2)]
    x = torch.randn(200, 3, 8, 8)
    before = fxfuse.fuse(members, x[:4], size=width, heads=Heads(heads))
    result = fxfuse.fuse(
        members,
        x[:4],
        calibration=x,
        size=width,
        refine=[Refit()],
        method=Transplant(score="l2"),
        heads=Heads(heads),
    )
    assert no_layer_got_worse(result.refit)
    weights = {fit.weight for fit in result.refit.layers if fit.fitted}
    assert weights >= {"block1.conv1.weight", "heads.0.fc.weight", "heads.1.fc.weight"}
    fresh = torch.randn(100, 3, 8, 8)
    with torch.no_grad():
        answers = zip(members, before.module(fresh), result.module(fresh), strict=True)
        for m, plainly, refitted in answers:
            assert distance(refitted, m(fresh)) < 0.5 * distance(plainly, m(fresh))


def test_units_of_others_in_a_head_have_no_target():
    """A head's own norm on the trunk is left; the layers behind it make up for it."""
    members = [tower(0, 3), tower(1, 7, hidden=9)]
    x = torch.randn(300, 4).double()
    result = fxfuse.fuse(
        members,
        x[:4],
        calibration=x,
        refine=[Refit()],
        method=Transplant(score="l2"),
        heads=Heads(HEADS),
    )
    fits = {fit.weight: fit for fit in result.refit.layers}
    assert no_layer_got_worse(result.refit)
    for i in range(2):
        assert "no member" in fits[f"heads.{i}.norm.weight"].why
        assert fits[f"heads.{i}.up.weight"].fitted
        assert f"heads.{i}.norm.weight" in result.refit.left


def test_an_early_head_is_fitted_on_its_own_way():
    """Heads of another member stand between a lane's own nodes."""

    class Early(nn.Module):
        def __init__(self, classes: int) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 10), nn.Linear(10, 8)
            self.early, self.late = nn.Linear(10, classes), nn.Linear(8, classes)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            h = self.first(x).relu()
            return self.early(h), self.late(self.second(h).relu())

    torch.manual_seed(1)
    members, x = [Early(2).eval(), Early(3).eval()], torch.randn(300, 6)
    heads = ["early", "late"]
    plainly = fxfuse.fuse(members, x[:4], heads=Heads(heads))
    result = fxfuse.fuse(
        members,
        x[:4],
        calibration=x,
        refine=[Refit()],
        method=Transplant(score="l2"),
        heads=Heads(heads),
    )
    with torch.no_grad():
        for i, m in enumerate(members):
            for wanted, a, b in zip(m(x), plainly.module(x)[i], result.module(x)[i], strict=True):
                assert distance(b, wanted) < distance(a, wanted)


@pytest.mark.parametrize("options", [{"heads": "concat"}, {"heads": "union"}])
def test_heads_that_are_handed_out_as_one_tensor(options: dict[str, str]):
    members, x = plain(), torch.randn(400, 6)
    classes = [list("abc"), list("cdef")] if options["heads"] == "union" else None
    told = {"example": x[:4], "classes": classes, **options}
    plainly = fxfuse.fuse(members, **flat(**told)).module(x)
    exact = fxfuse.fuse(members, **flat(width=2, **told)).module(x)
    refitted = fxfuse.fuse(members, **flat(refit=True, calibration=x, **told)).module(x)
    assert distance(refitted, exact) < 0.5 * distance(plainly, exact)


def test_a_refit_afterwards_is_the_same():
    members, x = plain(), torch.randn(400, 6)
    at_once = fxfuse.fuse(
        members,
        x[:4],
        calibration=x,
        refine=[Refit()],
        method=Transplant(score="l2"),
        heads=Heads(["head"]),
    )
    later = fxfuse.fuse(members, x[:4], heads=Heads(["head"]))
    report = refit(later, members, x)
    for name, tensor in at_once.state_dict().items():
        assert torch.equal(tensor, later.state_dict()[name]), name
    assert report.layers == at_once.refit.layers
    with pytest.raises(MemberError, match=r"member 0(.|\n)*heads\.0\.head\.weight"):
        refit(later, members[::-1], x)


@pytest.mark.parametrize("score", ["activation", "obs"])
def test_scores_that_measure_see_the_trunk(score: str):
    members = [member(seed, 3 + seed, torch.float32) for seed in range(2)]
    x = torch.randn(200, 3, 8, 8)
    result = fxfuse.fuse(
        members,
        x[:4],
        calibration=x,
        refine=[Refit()],
        method=Transplant(score=score),
        heads=Heads(["fc"]),
    )
    plainly = fxfuse.fuse(members, x[:4], heads=Heads(["fc"]))
    with torch.no_grad():
        for m, a, b in zip(members, plainly.module(x), result.module(x), strict=True):
            assert distance(b, m(x)) < distance(a, m(x))


@pytest.mark.parametrize(
    "heads", ["concat", *(pytest.param(h, marks=pytest.mark.nightly) for h in ("union", ["head"]))]
)
def test_obs_keeps_the_unit_that_one_head_reads_strongly(heads: str | list[str]):
    """Nothing but the heads reads the last group, and its weights tell nothing of that."""
    members, x = plain(), torch.randn(400, 6)
    with torch.no_grad():
        # A small unit that one head reads, and a large one that none reads.
        members[1].second.weight[5] *= 0.05
        members[1].second.bias[5] = 0
        members[1].head.weight[:, 5] *= 400
        members[0].second.weight[2] *= 5
        members[0].head.weight[:, 2] = 0
    classes = [list("abc"), list("cdef")] if heads == "union" else None
    told = {"example": x[:4], "heads": heads, "classes": classes}
    for given, kept in (
        ({"score": "l2"}, {(0, 2)}),
        ({"score": "obs", "calibration": x}, {(1, 5)}),
    ):
        plan = fxfuse.fuse(members, **flat(width=0.25, **given, **told)).plan
        units = plan.map_of("second.weight:0")
        found = set(zip(units.member.tolist(), units.unit.tolist(), strict=True))
        assert found & {(0, 2), (1, 5)} == kept


def test_obs_knows_that_a_heads_own_norm_has_nothing_for_units_of_others():
    """Behind a norm of a head, copies in other members make up for no unit."""
    members = [tower(0, 3), tower(0, 3)]
    with torch.no_grad():
        for own, unit in zip(members, (1, 4), strict=True):
            own.up.weight *= 0.01
            own.up.weight[:, unit] = 1
    x = torch.randn(300, 4).double()
    result = fxfuse.fuse(
        members,
        x[:4],
        calibration=x,
        size=1 / 3,
        refine=[Refit()],
        method=Transplant(score="obs"),
        heads=Heads(HEADS),
    )
    units = result.plan.map_of("trunk.2.weight:0")
    assert set(zip(units.member.tolist(), units.unit.tolist(), strict=True)) == {(0, 1), (1, 4)}


def test_what_needs_one_task_is_refused():
    members, x = plain(), torch.randn(200, 6)
    with pytest.raises(OptionError, match="choose a start") as caught:
        fxfuse.fuse(members, x[:4], calibration=x, refine=[Refit(), Match()], heads=Heads(["head"]))
    assert "refine=[Refit()]" in caught.value.how
    labelled = [(x, torch.zeros(200, dtype=torch.int64))]
    with pytest.raises(OptionError, match="one loss"):
        fxfuse.fuse(
            members,
            x[:4],
            calibration=labelled,
            refine=[],
            method=Transplant(score="taylor"),
            heads=Heads(["head"]),
        )


def test_two_tasks_on_digits():
    """Parity and digit: unlabelled images bring both heads close to their members."""
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    tasks, fresh = [labels, labels % 2], x[1300:]

    class Net(SmallResNet):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.expand(-1, 3, -1, -1))

    members: list[nn.Module] = []
    for task, classes in enumerate((10, 2)):
        torch.manual_seed(task)
        batches = list(zip(x[:1300].split(64), tasks[task][:1300].split(64), strict=True))
        net = Net(width=12, classes=classes)
        finetune(net, batches, steps=80, progress=False)
        members.append(net.eval())
    options = {"heads": ["fc"], "example": x[:4]}
    plainly = fxfuse.fuse(members, **flat(**options)).module
    refitted = fxfuse.fuse(members, **flat(refit=True, calibration=x[:500], **options)).module
    with torch.no_grad():
        for m, a, b in zip(members, plainly(fresh), refitted(fresh), strict=True):
            wanted = m(fresh)
            assert distance(b, wanted) < 0.5 * distance(a, wanted)
            agreed = [(y.argmax(1) == wanted.argmax(1)).float().mean() for y in (a, b)]
            assert agreed[1] > agreed[0]
            print(distance(a, wanted), distance(b, wanted), agreed)
