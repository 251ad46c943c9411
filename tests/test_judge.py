"""The judge: what it has seen, what it accepts, and what it rejects."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import fxfuse
from fxfuse import Calibration, Classification, Embedding, Match, Refit
from fxfuse.activations.calibration import CalibrationBatches
from fxfuse.errors import FxfuseError, InputError, OptionError
from fxfuse.refine import MatchReport, pipeline, starts
from fxfuse.refine.judge import Judge, Measured, ask_members, compare, copied, divided, folds
from fxfuse.refine.pool import Teacher
from tests.nets import mean_of


class Net(nn.Module):
    def __init__(self, seed: int, hidden: int = 12) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.last = nn.Linear(4, hidden), nn.Linear(hidden, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x).relu())


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X, MANY, FRESH = drawn(160, 4), drawn(400, 4), drawn(500, 4, seed=7)
MEMBERS = [Net(0).eval(), Net(1).eval()]


def sharper(seed: int, hidden: int = 12) -> nn.Module:
    """A network that no refit alone brings to where it could be."""
    network = Net(seed, hidden).eval()
    with torch.no_grad():
        network.last.weight *= 4
        network.last.bias *= 4
    return network


def fused(calibration: Any = X, members: list[nn.Module] = MEMBERS, **options: Any) -> Any:
    return fxfuse.fuse(members, X[:4], calibration=calibration, **options)


def rows(inputs: Any) -> set[float]:
    """Each input by its first number, which no other has."""
    return set(inputs.whole[0][0][:, 0].tolist())


# --- The comparison -----------------------------------------------------------------------------


def judged(difference: torch.Tensor) -> Any:
    """The verdict on a network that is closer by this on each input."""
    old = 10 + drawn(len(difference), seed=5)
    return compare(Measured(old - difference), Measured(old))


def test_an_improvement_within_noise_is_not_accepted_and_a_clear_one_is():
    noise = drawn(60)
    noise -= noise.mean()
    for shift, better in ((0.05, False), (1.0, True), (-1.0, False), (0.0, False)):
        verdict = judged(noise + shift)
        assert verdict.better is better
        assert verdict.gain == pytest.approx(shift, abs=1e-5)
        assert verdict.low <= verdict.gain <= verdict.high
    # In the middle of noise that both share a small gain is clear: the inputs are paired.
    assert judged(0.01 * noise + 0.01).better
    assert judged(noise - 1).high < 0


def test_where_there_is_no_difference_about_one_in_twenty_is_accepted():
    accepted = [judged(drawn(80, seed=seed)).better for seed in range(300)]
    assert 0.02 < sum(accepted) / len(accepted) < 0.09


def test_nothing_is_said_of_one_input_and_nothing_of_two_that_are_equal():
    assert not judged(torch.ones(1)).better
    assert not judged(torch.zeros(50)).better


def test_an_own_metric_alone_decides():
    near, far = Measured(torch.zeros(50), 0.5), Measured(torch.ones(50), 0.6)
    assert compare(far, near).better
    assert not compare(near, far).better
    assert not compare(near, near).better


# --- The parts ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "share"), [(100, 0.3), (101, 0.3), (333, 0.5), (1000, 0.1)])
@pytest.mark.parametrize("seed", [None, 3])
def test_inputs_that_fit_choose_and_accept_are_apart(count: int, share: float, seed: int | None):
    calibration = CalibrationBatches.plain(torch.arange(2.0 * count).reshape(count, 2), 16)
    parts = divided(calibration, share, seed)
    fitting, choosing, accepting = map(rows, parts)
    assert fitting | choosing | accepting == rows(calibration)
    assert len(fitting) + len(choosing) + len(accepting) == count
    assert [len(x) for x in (fitting, choosing, accepting)] == [part.size for part in parts]
    assert abs(len(choosing) - share * count / 2) <= 1
    assert abs(len(accepting) - share * count / 2) <= 1


@pytest.mark.parametrize("count", [4, 7, 40, 99])
def test_each_part_of_few_inputs_is_apart_from_its_others(count: int):
    calibration = CalibrationBatches.plain(torch.arange(2.0 * count).reshape(count, 2), 16)
    seen: list[float] = []
    for others, part in folds(calibration, 4):
        assert rows(others).isdisjoint(rows(part))
        assert rows(others) | rows(part) == rows(calibration)
        assert others.size + part.size == count
        seen += rows(part)
    assert sorted(seen) == sorted(rows(calibration))


class Spy:
    """Notes which inputs every fit sees, by each time that the way is gone."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fits: list[dict[str, set[float]]] = []
        self.parts: list[tuple[Any, ...]] = []

        def note(name: str, inputs: Any) -> None:
            self.fits[-1].setdefault(name, set()).update(rows(inputs))

        def making(way: Any, fitting: Any, choose: Any) -> Any:
            self.fits.append({})
            return made(way, fitting, choose)

        def pooling(teacher: Any, inputs: Any, **options: Any) -> Any:
            pool = pooled(teacher, inputs, **options)
            self.fits[-1].setdefault("pool", set()).update(pool.inputs[0][0][:, 0].tolist())
            return pool

        def refitting(*given: Any) -> Any:
            note("refit", given[4])
            return refitted(*given)

        def planning(planner: Any, batches: Any) -> Any:
            note("plan", batches)
            return planned(planner, batches)

        def parting(name: str, old: Any) -> Callable[..., Any]:
            def part(*given: Any) -> Any:
                found = old(*given)
                self.parts.append((name, found))
                return found

            return part

        from fxfuse.api.stages import Planner

        made, pooled, planned = pipeline._Way._make, Teacher.pool, Planner.plan
        refitted = pipeline.refit_state
        monkeypatch.setattr(pipeline._Way, "_make", making)
        monkeypatch.setattr(Teacher, "pool", pooling)
        monkeypatch.setattr(Planner, "plan", planning)
        monkeypatch.setattr(pipeline, "refit_state", refitting)
        for name in ("divided", "folds"):
            monkeypatch.setattr(pipeline, name, parting(name, getattr(pipeline, name)))

    def found(self, name: str) -> Any:
        return next(parts for each, parts in self.parts if each == name)


def test_no_input_that_judges_was_seen_by_any_fit(monkeypatch: pytest.MonkeyPatch):
    spy = Spy(monkeypatch)
    result = fused(refine=[Refit(), Match(steps=40)])
    fitting, choosing, accepting = spy.found("divided")
    assert result.history.inputs == accepting.size == 24
    (fits,) = spy.fits
    assert set(fits) == {"plan", "refit", "pool"}
    for name, seen in fits.items():
        assert seen == rows(fitting), name
        assert seen.isdisjoint(rows(choosing)), name
        assert seen.isdisjoint(rows(accepting)), name


def test_few_inputs_are_cross_fitted_and_no_part_was_seen_by_its_fits(
    monkeypatch: pytest.MonkeyPatch,
):
    spy = Spy(monkeypatch)
    with pytest.warns(UserWarning, match="60 calibration inputs are few"):
        result = fused(X[:60], refine=[Refit(), Match(steps=20)])
    assert result.history.inputs == 60
    parts = spy.found("folds")
    assert len(parts) == 4
    # The last time is that of the network that is returned.
    assert len(spy.fits) == len(parts) + 1
    for fits, (others, part) in zip(spy.fits, parts, strict=False):
        assert set(fits) == {"plan", "refit", "pool"}
        for name, seen in fits.items():
            assert seen <= rows(others), name
            assert seen.isdisjoint(rows(part)), name


def test_an_input_that_judges_changes_no_weight(monkeypatch: pytest.MonkeyPatch):
    """Inputs of another size among those that accept: the refitted network is the same."""
    spy = Spy(monkeypatch)
    options = {"refine": [Refit()], "method": fxfuse.Transplant(score="l2")}
    one = fused(**options)
    accepting = rows(spy.found("divided")[2])
    other = X.clone()
    mine = torch.tensor([value in accepting for value in X[:, 0].tolist()])
    other[mine, 1:] *= 1.5
    two = fused(other, **options)
    assert one.history.chosen == two.history.chosen == "refitted"
    assert one.history["refitted"].judged != two.history["refitted"].judged
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, two.state_dict()[name]), name


# --- What is accepted, and what is rejected -----------------------------------------------------


def equal(one: Any, other: Any) -> bool:
    states = one.state_dict(), other.state_dict()
    return states[0].keys() == states[1].keys() and all(
        torch.equal(tensor, states[1][name]) for name, tensor in states[0].items()
    )


def test_what_helps_is_accepted():
    members = [sharper(0), sharper(1)]
    history = fused(MANY, members, refine=[Refit(), Match(steps=200)]).history
    best = min(c.judged for c in history.starts)
    refitted, matched = history["refitted"], history["matched from refitted"]
    assert refitted.accepted
    assert refitted.against in {
        "matched from member 0",
        "matched from member 1",
        "member 0",
        "member 1",
    }
    assert refitted.low > 0
    assert refitted.gain == pytest.approx(history[refitted.against].judged - refitted.judged)
    assert matched.accepted
    assert matched.judged < refitted.judged < best
    assert history.chosen == "matched from refitted"


def test_the_closer_network_has_more_of_the_seconds(monkeypatch: pytest.MonkeyPatch):
    """All of them together is what was asked for."""
    budgets: list[float] = []
    train = pipeline.train

    def noting(module: Any, members: Any, inputs: Any, judge: Any, options: Match, **given: Any):
        budgets.append(options.seconds)
        return train(module, members, inputs, judge, replace(options, seconds=None, steps=1))

    monkeypatch.setattr(pipeline, "train", noting)
    steps = [Refit(), Match(seconds=8.0)]
    history = fused(MANY, [sharper(0), sharper(1)], refine=steps).history
    best = min(c.chosen_by for c in history.starts)
    refitted = history["refitted"].chosen_by
    assert sum(budgets) == pytest.approx(8.0)
    assert budgets[1] / budgets[0] == pytest.approx(best / refitted)
    # The scale and the sign of a user's own metric say nothing.
    assert pipeline._shares([-0.9, -0.3]) == [0.5, 0.5]


@pytest.mark.parametrize(("near", "times"), [(0.0, 1e6), (1e6, 1.0), (1e6, 1e6)])
def test_a_near_member_stays_unless_the_fused_network_is_far_closer(
    monkeypatch: pytest.MonkeyPatch, near: float, times: float
):
    monkeypatch.setattr(pipeline, "_NEAR", near)
    monkeypatch.setattr(pipeline, "_CLEAR", times)
    history = fused(MANY, [sharper(0), sharper(1)], refine=[Refit()]).history
    stays = near > 0 and times > 1
    assert history["refitted"].low > 0
    assert history["refitted"].accepted is not stays
    if stays:
        assert history.chosen.startswith("member")
        assert "as close as a near member" in history["refitted"].verdict


def test_a_metric_of_the_users_own_needs_no_margin(monkeypatch: pytest.MonkeyPatch):
    """It says itself which network knows more."""
    monkeypatch.setattr(pipeline, "_NEAR", 1e6)
    monkeypatch.setattr(pipeline, "_CLEAR", 1e6)
    members = [sharper(0), sharper(1)]

    def closeness(network: nn.Module) -> float:
        with torch.no_grad():
            wanted = torch.stack([member(FRESH).softmax(1) for member in members]).mean(0)
            return -float((network(FRESH).softmax(1) - wanted).abs().mean())

    calibration = Calibration(MANY, evaluate=closeness)
    history = fused(calibration, members, refine=[Refit()]).history
    assert history["refitted"].accepted


@pytest.mark.parametrize("steps", [[Match(steps=30, learning_rate=1.0)], [Refit()]])
def test_training_that_does_harm_is_sent_back(steps: list[Any]):
    harmful = [step for step in steps if isinstance(step, Refit)]
    harmful.append(Match(steps=30, learning_rate=1.0))
    result, without = fused(refine=harmful), fused(refine=[Refit()])
    if len(harmful) == 1:
        best = min(result.history.starts, key=lambda c: c.chosen_by).name
        assert result.history.chosen == best
        assert equal(result, MEMBERS[int(best[-1])])
    else:
        assert result.history.chosen == without.history.chosen == "refitted"
        assert equal(result, without)
    sent = [c for c in result.history.candidates if c.name.startswith("matched")]
    assert sent
    assert all("rejected" in c.verdict or "left out" in c.verdict for c in sent)
    assert not result.match.kept
    with torch.no_grad():
        assert torch.equal(result.module(FRESH), without.module(FRESH)) is (len(harmful) == 2)


def test_what_chose_too_kindly_is_sent_back_by_the_inputs_that_accept(
    monkeypatch: pytest.MonkeyPatch,
):
    """A matching that says that it has helped, and has not."""

    def train(module: nn.Module, *given: Any, **options: Any) -> MatchReport:
        with torch.no_grad():
            for parameter in module.parameters():
                parameter += 0.1 * drawn(*parameter.shape)
        return MatchReport(1, 1.0, 0.1, 1.0, 100, 64, 1e-3, True, (), 1.0, 0.1, True)

    without = fused(refine=[Refit()])
    monkeypatch.setattr(pipeline, "train", train)
    result = fused(refine=[Refit(), Match()])
    assert result.history.chosen == "refitted"
    assert result.history["matched from refitted"].verdict == "rejected: worse"
    assert result.history["matched from refitted"].high < 0
    assert equal(result, without)


def test_a_refit_that_does_harm_is_sent_back(monkeypatch: pytest.MonkeyPatch):
    def refit_state(graph: Any, plan: Any, states: Any, state: Any, *rest: Any) -> Any:
        return {name: 3 * tensor for name, tensor in state.items()}, None

    monkeypatch.setattr(pipeline, "refit_state", refit_state)
    result = fused(refine=[Refit()])
    history = result.history
    assert history["refitted"].verdict == "rejected: worse"
    assert history.chosen.startswith("member")
    assert equal(result, MEMBERS[int(history.chosen[-1])])
    assert result.plan.options["start"] == history.chosen


@pytest.mark.parametrize("seed", range(3))
def test_never_worse_than_the_best_member(seed: int):
    """Members of which one is the ensemble, nearly: there is little to win, and much to lose."""
    torch.manual_seed(seed)
    near = [copy.deepcopy(Net(seed)).eval() for _ in range(2)]
    with torch.no_grad():
        for parameter in near[1].parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    members = [*near, Net(seed + 50).eval()]
    task = Classification(weights=(5, 5, 1))
    x = drawn(110, 4, seed=seed)
    result = fxfuse.fuse(
        members, x[:4], calibration=x, task=task, refine=[Refit(), Match(steps=20)]
    )
    with torch.no_grad():
        wanted = task.combine([member(FRESH) for member in members])
        found = Measured(task.distance(result.module(FRESH), wanted).double())
        each = [Measured(task.distance(m(FRESH), wanted).double()) for m in members]
    best = min(each, key=lambda measured: measured.mean)
    assert not compare(best, found).better
    history = result.history
    assert history[history.chosen].judged <= min(c.judged for c in history.starts) * 1.05


# --- Starts -------------------------------------------------------------------------------------


def test_members_side_by_side_are_their_mean():
    task = Classification(combine_by="logits")
    result = fused(size=2, task=task, refine=[Refit()])
    assert result.history.chosen == "members 0, 1 side by side"
    assert result.history[result.history.chosen].judged < 1e-6
    with torch.no_grad():
        torch.testing.assert_close(result.module(FRESH), mean_of(MEMBERS, FRESH))
    # Of three members, the two that are closest together, and the plan is that of these two.
    members = [*MEMBERS, Net(2).eval()]
    result = fused(members=members, size=2, task=task, refine=[Match(steps=1)])
    (name,) = [c.name for c in result.history.starts if "side by side" in c.name]
    chosen = [int(part) for part in name.removesuffix(" side by side")[8:].split(", ")]
    pairs = {(0, 1), (0, 2), (1, 2)}
    assert tuple(chosen) in pairs
    if result.history.chosen == name:
        assert result.plan.n_members == 2
        with torch.no_grad():
            wanted = mean_of([members[i] for i in chosen], FRESH)
            torch.testing.assert_close(result.module(FRESH), wanted)
    best = min(c.judged for c in result.history.starts if c.name.startswith("member "))
    assert result.history[name].judged < best


@pytest.mark.parametrize("size", [1.25, 1.5])
def test_a_member_with_units_of_others_is_the_member_until_it_is_trained(
    size: float, monkeypatch: pytest.MonkeyPatch
):
    grown = []

    def spy(*given: Any) -> Any:
        grown.append(starts.grown_start(*given))
        return grown[-1]

    monkeypatch.setattr(pipeline, "grown_start", spy)
    members = [sharper(0), sharper(1), sharper(2)]
    result = fused(MANY, members, size=size, refine=[Match(steps=40)])
    assert result.history is not None
    (found,) = grown
    best = members[int(found.name.split()[1])]
    assert found.module.get_parameter("first.weight").shape == (int(12 * size), 4)
    torch.testing.assert_close(found.module(FRESH), best(FRESH))
    lines = {line.name: line for line in result.history.candidates}
    assert lines[f"matched from {found.name}"].accepted
    assert lines[f"matched from {found.name}"].judged < lines[found.name].judged
    others = {tuple(row) for row in found.plan.maps[0].units() if row[0] != found.plan.base_member}
    assert len(others) == int(12 * size) - 12


def test_a_start_shares_no_tensor_with_a_member():
    result = fused([X][0], members=[MEMBERS[0], copy.deepcopy(MEMBERS[0])], refine=[Refit()])
    assert result.history.chosen == "member 0"
    mine = {t.data_ptr() for t in MEMBERS[0].parameters()}
    assert mine.isdisjoint(t.data_ptr() for t in result.module.parameters())


def test_pruning_goes_the_whole_way():
    network, x = sharper(3, hidden=32), MANY
    # The default is the whole way.
    result = fxfuse.prune(network, x[:4], size=0.5, calibration=x)
    history = result.history
    assert result.plan.sizes() == {"first.weight:0": 16}
    assert history.candidates[0].verdict == "the only start at this size"
    assert history["matched from refitted"].accepted
    assert history.chosen == "matched from refitted"
    raw = fxfuse.prune(network, x[:4], size=0.5, calibration=x, refine=[])
    far = []
    with torch.no_grad():
        wanted = Classification().combine([network(FRESH)])
        for module in (result.module, raw.module):
            far.append(float(Classification().distance(module(FRESH), wanted).mean()))
    assert far[0] < 0.3 * far[1]


# --- Labels and one's own metric ----------------------------------------------------------------


def confident() -> list[nn.Module]:
    """Members of which the second one is right, and sure of it."""
    members = [Net(0).eval(), Net(1).eval()]
    with torch.no_grad():
        members[1].last.weight *= 20
        members[1].last.bias *= 20
    return members


def labels_of(member: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return member(x).argmax(1)


def test_labels_judge_where_they_are_given():
    members = confident()
    labels = labels_of(members[1], X)
    batches = [(X[i : i + 40], labels[i : i + 40]) for i in range(0, 160, 40)]
    result = fused(batches, members, refine=[Refit()])
    history = result.history
    assert history.unit == "loss on the labels"
    assert history.chosen == "member 1"
    assert history["refitted"].verdict == "rejected: worse"
    # It is the negative log-likelihood, on the inputs that accept.
    _, _, accepting = divided(CalibrationBatches.of(result.graph.program, batches), 0.3)
    with torch.no_grad():
        answers = members[1](accepting.whole[0][0])
    loss = functional.cross_entropy(answers, torch.cat(accepting.labels))
    assert history["member 1"].judged == pytest.approx(float(loss), rel=1e-4)
    # Without labels the ensemble judges, and the refitted network is closer to it.
    assert fused(X, members, refine=[Refit()]).history.chosen == "refitted"


def test_labels_judge_few_inputs_too():
    members = confident()
    with pytest.warns(UserWarning, match="few"):
        result = fused([(X[:60], labels_of(members[1], X[:60]))], members, refine=[Refit()])
    assert result.history.inputs == 60
    assert result.history.unit == "loss on the labels"
    assert result.history.chosen == "member 1"


def test_a_metric_that_fails_while_matching_is_an_error_and_no_note():
    calls = []

    def evaluate(network: nn.Module) -> float:
        calls.append(network)
        return float("nan") if len(calls) == 5 else 1.0

    with pytest.raises(OptionError, match="evaluate returns nan"):
        fused(Calibration(X, evaluate=evaluate), refine=[Match(steps=10)])


@pytest.mark.parametrize("held_out", [0.3, 0])
def test_an_own_metric_judges_instead_of_the_ensemble(held_out: float):
    calls = []

    def evaluate(network: nn.Module) -> float:
        assert not network.training
        assert not torch.is_grad_enabled()
        calls.append(network)
        return -float((network(FRESH) - MEMBERS[1](FRESH)).square().mean())

    calibration = Calibration(X, evaluate=evaluate, held_out=held_out)
    result = fused(calibration, refine=[Refit(), Match(steps=10)])
    history = result.history
    assert history.unit == "minus your own metric"
    assert history.chosen == "member 1"
    assert equal(result, MEMBERS[1])
    assert history["member 1"].judged == pytest.approx(0, abs=1e-9)
    with torch.no_grad():
        assert history["member 0"].judged == pytest.approx(-evaluate(MEMBERS[0]), rel=1e-4)
    assert len(calls) > 4
    # The ensemble itself would say something else.
    assert "refitted" in fused(refine=[Refit()]).history.chosen


# --- Inputs by keyword, and what is printed -----------------------------------------------------


class Keyed(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.net = sharper(seed)

    def forward(self, *, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return self.net(torch.cat([left, right], 1))


def test_inputs_by_keyword_are_matched_and_judged():
    members = [Keyed(0).eval(), Keyed(1).eval()]
    given = {"left": MANY[:, :2], "right": MANY[:, 2:]}

    def batches() -> Iterator[dict[str, torch.Tensor]]:
        for i in range(0, 400, 40):
            yield {name: x[i : i + 40] for name, x in given.items()}

    example = {name: x[:4] for name, x in given.items()}
    steps = [Refit(), Match(steps=200)]
    one = fxfuse.fuse(members, example, calibration=given, refine=steps)
    two = fxfuse.fuse(members, example, calibration=batches(), refine=steps)
    assert one.history.chosen == "matched from refitted"
    assert one.history["matched from refitted"].accepted
    assert equal(one, two)
    plain = fused(MANY, [sharper(0), sharper(1)], refine=steps)
    assert one.history["matched from refitted"].judged == pytest.approx(
        plain.history["matched from refitted"].judged, rel=0.05
    )


class Signals(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv1d(2, 6, 3, padding=1), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.conv(x).relu().mean(2))


def signals(seed: int) -> list[nn.Module]:
    torch.manual_seed(seed)
    return [Signals().eval() for _ in range(2)]


def test_an_input_and_its_copy_are_one_draw_of_the_judge():
    members, x = signals(0), drawn(20, 2, 9)
    inputs, task = CalibrationBatches.plain(x, 8), Classification()

    def shifted(batch: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return batch + torch.rand(batch.shape, generator=generator)

    copies = copied(inputs, shifted)
    assert copies is not None
    both = Judge(task, ask_members(task, members, inputs, copies)).measure(members[0]).each
    one, other = (
        Judge(task, ask_members(task, members, part)).measure(members[0]).each
        for part in (inputs, copies)
    )
    assert len(both) == 20
    assert not torch.allclose(one, other, rtol=0.01)
    torch.testing.assert_close(both, (one + other) / 2)
    assert copied(inputs, None) is None
    assert copied(replace(inputs, labels=(torch.zeros(20),)), shifted) is None


@pytest.mark.parametrize("count", [160, 40])
def test_copies_judge_where_matching_learns_from_them_and_are_no_further_inputs(count: int):
    members, x = signals(1), drawn(count, 2, 9)

    def judged(calibration: Any, steps: list[Any]) -> Any:
        return fxfuse.fuse(members, x[:4], calibration=calibration, refine=steps).history

    steps = {name: [Refit(), Match(steps=5, augment=name)] for name in (True, False)}
    with_copies, without = (judged(x, steps[name]) for name in (True, False))
    plain = judged(x, [Refit()])
    assert with_copies.inputs == without.inputs == plain.inputs
    for name in ("member 0", "member 1"):
        assert without[name].judged == plain[name].judged != with_copies[name].judged
    # Labels and a metric of the user's own need no copies.
    labels = torch.arange(count) % 3
    by_labels = [judged([(x, labels)], steps[name])["member 0"] for name in (True, False)]
    assert by_labels[0].judged == by_labels[1].judged
    metric = Calibration(x, evaluate=lambda network: float(network(x).var()))
    by_metric = [judged(metric, steps[name])["member 0"] for name in (True, False)]
    assert by_metric[0].judged == by_metric[1].judged


def test_a_function_of_one_tensor_is_refused_for_inputs_by_keyword():
    given = {"left": MANY[:, :2], "right": MANY[:, 2:]}
    example = {name: x[:4] for name, x in given.items()}
    steps = [Match(steps=2, augment=lambda x, generator: x)]
    with pytest.raises(OptionError, match="augment works with one input tensor, got 2"):
        fxfuse.fuse([Keyed(0).eval(), Keyed(1).eval()], example, calibration=given, refine=steps)


def test_what_members_remember_does_not_send_back_what_copies_show():
    """On whole numbers the members agree; matching is judged between them, too."""
    x = drawn(200, 2, 9).round()
    members = signals(2)

    class Remembering(nn.Module):
        def __init__(self, network: nn.Module, sign: float) -> None:
            super().__init__()
            self.network = network
            self.own = nn.Parameter(torch.full((2, 1), 8.0 * sign))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            off = (x * torch.pi).sin() * self.own
            return self.network(x) + off.mean(2).sum(1, keepdim=True) * torch.tensor([1.0, 0, -1])

    remembering: list[nn.Module] = [Remembering(members[0], s).eval() for s in (1.0, -0.4)]
    histories = [
        fxfuse.fuse(remembering, x[:4], calibration=x, refine=[Match(steps=60, augment=augment)])
        for augment in (True, False)
    ]
    with_copies, without = (result.history for result in histories)
    assert without.chosen.startswith("member")
    assert with_copies.chosen.startswith("matched from")


def test_the_history_is_a_table_of_ten_lines_at_most():
    members = [Net(seed).eval() for seed in range(8)]
    history = fused(members=members, refine=[Refit(), Match(steps=20)]).history
    lines = str(history).splitlines()
    assert len(history.candidates) >= 10
    assert len(lines) <= 10
    assert max(map(len, lines)) < 220
    assert lines[0].startswith(f"{history.chosen} is returned, judged on 24 inputs")
    assert "Classification(): the output [b, 3] is that of a layer" in lines[-1]
    assert history.chosen in {line.strip().split("  ")[0] for line in lines[1:]}
    few = str(fused(refine=[Refit()]).history).splitlines()
    names = [line.strip().split("  ")[0] for line in few[1:]]
    assert sorted(names) == ["member 0", "member 1", "refitted", "task"]
    assert names[2:] == ["refitted", "task"]
    told = history.as_json()
    assert len(told["candidates"]) == len(history.candidates)
    assert told["chosen"] == history.chosen


# --- Bad input ----------------------------------------------------------------------------------


def raising(network: nn.Module) -> float:
    raise ValueError("no data")


def labelled(labels: torch.Tensor | Any, task: Any = None) -> None:
    batches = [(X[:100], labels[:100]), (X[100:], labels[100:])]
    fused(batches, task=task, refine=[Refit(), Match(steps=2)])


CLASSES = torch.arange(160) % 3
BAD: dict[str, tuple[Callable[[], Any], type[FxfuseError], str]] = {
    "evaluate raises": (
        lambda: fused(Calibration(X, evaluate=raising)),
        OptionError,
        "evaluate raises an error",
    ),
    "evaluate returns NaN": (
        lambda: fused(Calibration(X, evaluate=lambda network: float("nan"))),
        OptionError,
        "evaluate returns nan",
    ),
    "evaluate returns nothing": (
        lambda: fused(Calibration(X, evaluate=lambda network: None)),
        OptionError,
        "evaluate raises an error",
    ),
    "too few labels": (lambda: labelled(CLASSES[:150]), InputError, "labels for 60 inputs"),
    "too many labels": (
        lambda: labelled(torch.cat([CLASSES, CLASSES])),
        InputError,
        "labels for 60 inputs",
    ),
    "a class too many": (
        lambda: labelled(torch.where(torch.arange(160) == 159, 3, CLASSES)),
        InputError,
        "a label lies outside 0 to 2",
    ),
    "a class below zero": (lambda: labelled(CLASSES - 1), InputError, "outside 0 to 2"),
    "labels that are no classes": (
        lambda: labelled(CLASSES.float()),
        InputError,
        "the labels do not fit",
    ),
    "labels of another shape": (
        lambda: labelled(torch.stack([CLASSES, CLASSES], 1)),
        InputError,
        "the labels do not fit",
    ),
    "labels that are no tensor": (
        lambda: labelled(CLASSES.tolist()),
        InputError,
        "labels are a list",
    ),
    "labels that say nothing": (
        lambda: labelled(CLASSES, Embedding()),
        InputError,
        "there is no use for labels",
    ),
    "labels of some": (
        lambda: fused([(X[:100], CLASSES[:100]), X[100:]], refine=[Refit()]),
        InputError,
        "labels are a NoneType",
    ),
    "a single input": (lambda: fused(X[:1]), InputError, "1 calibration inputs are too few"),
    "three inputs": (lambda: fused(X[:3]), InputError, "3 calibration inputs are too few"),
    "no inputs": (lambda: fused([]), InputError, "there are no calibration inputs"),
    "inputs for nothing": (
        lambda: fused(refine=[], method="average"),
        InputError,
        "there is no use for the calibration inputs",
    ),
    "inputs for a score of weights": (
        lambda: fused(refine=[], method=fxfuse.Transplant(score="l2")),
        InputError,
        "there is no use for the calibration inputs",
    ),
    "inputs for nothing in pruning": (
        lambda: fxfuse.prune(
            MEMBERS[0],
            X[:4],
            size=0.5,
            calibration=X,
            refine=[],
            method=fxfuse.Transplant(score="l1"),
        ),
        InputError,
        "there is no use for the calibration inputs",
    ),
    "inputs for a plan": (
        lambda: fxfuse.build(fxfuse.fuse(MEMBERS, X[:4]).plan, MEMBERS, X[:4], calibration=X),
        InputError,
        "there is no use for the calibration inputs",
    ),
}


@pytest.mark.filterwarnings("ignore:.*calibration inputs are few")
@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named_before_work_starts(name: str):
    call, kind, message = BAD[name]
    with pytest.raises(FxfuseError, match=message) as caught:
        call()
    assert type(caught.value) is kind
    assert caught.value.how


def test_four_inputs_are_judged():
    with pytest.warns(UserWarning, match="few"):
        result = fused(X[:4], refine=[Refit(), Match(steps=2)])
    assert result.history.inputs == 4
    assert fused(Calibration(X[:2], held_out=0), refine=[Refit()]).history is None
