"""Label-free logit matching: what it learns, what it costs, what it refuses."""

from __future__ import annotations

import copy
import gc
import re
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from torch import nn

import fxfuse
from fxfuse import Classification, Match, Regression
from fxfuse.errors import FxfuseError, InputError, MemberError, OptionError, RefineError
from fxfuse.refine import match, shift_and_mix
from fxfuse.refine.match import _batch
from fxfuse.refine.pool import Teacher
from fxfuse.refine.schedule import Budget

INPUTS = torch.randn(120, 6, generator=torch.Generator().manual_seed(1))
IMAGES = torch.randn(40, 1, 6, 6, generator=torch.Generator().manual_seed(2))


def mlp(seed, outputs=3):
    """Batch normalisation and dropout: state and random numbers that a run must reproduce."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, outputs)
    ).eval()


def cnn(seed):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4)
    ).eval()


def mean_of(members, inputs):
    with torch.no_grad():
        return torch.stack([member(inputs) for member in members]).mean(dim=0)


def centred_error(module, wanted, inputs):
    with torch.no_grad():
        difference = module(inputs) - wanted
    return float((difference - difference.mean(1, keepdim=True)).square().mean())


def test_a_network_comes_closer_to_the_mean_of_the_members():
    members, module = [mlp(1), mlp(2)], mlp(3)
    before = [copy.deepcopy(member.state_dict()) for member in members]
    members[1][3].train()
    wanted = mean_of([mlp(1), mlp(2)], INPUTS)
    start = centred_error(module, wanted, INPUTS)
    report = match(module, members, INPUTS, Match(steps=200, learning_rate=1e-2))
    assert report.steps == 200
    assert report.last_loss < 0.3 * report.first_loss
    assert centred_error(module, wanted, INPUTS) < 0.15 * start
    assert not any(part.training for part in module.modules())
    # A tenth chooses, and a tenth accepts.
    assert report.pool == 96
    assert report.kept
    assert report.after < 0.15 * report.before
    for member, state in zip(members, before, strict=True):
        torch.testing.assert_close(dict(member.state_dict()), dict(state), rtol=0, atol=0)
    assert members[1][3].training


def test_specialists_are_matched_where_neither_of_them_is_right():
    """Each of two experts knows one half of the classes; only their sum tells all four apart."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(4, 6, generator=generator)
    members = []
    for own in ((0, 1), (2, 3)):
        member = nn.Linear(6, 4)
        member.weight.data.zero_()
        member.bias.data.zero_()
        member.weight.data[list(own)] = directions[list(own)]
        members.append(member)
    labels = (INPUTS @ directions.T).argmax(1)

    def right(module):
        with torch.no_grad():
            return float((module(INPUTS).argmax(1) == labels).float().mean())

    module = copy.deepcopy(members[0])
    assert right(module) < 0.7
    task = Classification(combine_by="logits")
    match(
        module, members, INPUTS, Match(steps=300, learning_rate=3e-2, weight_decay=0.0), task=task
    )
    assert right(module) > 0.95


@pytest.mark.parametrize("steps", [1, 19, 20, 21, 45])
def test_a_budget_in_steps_is_exact(steps):
    report = match(mlp(3), [mlp(1), mlp(2)], INPUTS, Match(steps=steps))
    assert report.steps == steps
    assert report.seconds > 0


def test_without_a_budget_there_are_300_steps():
    assert match(mlp(3), [mlp(1), mlp(2)], INPUTS, Match(batch=8)).steps == 300


@pytest.fixture
def clean_process() -> Iterator[None]:
    """What a process does once, or after thousands of tests, takes as long as a budget here.

    The first optimiser imports torch's compiler, and garbage of other tests is collected.
    """
    torch.optim.AdamW([torch.zeros(1)])
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("clean_process")
def test_a_budget_in_seconds_is_kept():
    begin = time.process_time()
    report = match(mlp(3), [mlp(1), mlp(2)], INPUTS, Match(seconds=0.5))
    assert report.steps > 20
    assert 0.45 < report.seconds < 1.0
    assert time.process_time() - begin < 1.2


@pytest.mark.usefixtures("clean_process")
def test_what_a_process_imports_once_is_no_part_of_the_budget(monkeypatch: pytest.MonkeyPatch):
    def first(*args):
        end = time.process_time() + 0.6
        while time.process_time() < end:
            pass

    monkeypatch.setitem(match.__globals__, "optimizer_of", first)
    report = match(mlp(3), [mlp(1), mlp(2)], INPUTS, Match(seconds=0.5))
    assert report.steps > 20
    assert report.seconds < 1.0


@pytest.mark.usefixtures("clean_process")
def test_members_get_no_more_than_their_share_of_the_seconds():
    class Slow(nn.Module):
        calls = 0

        def forward(self, x):
            self.calls += 1
            end = time.process_time() + 0.05
            while time.process_time() < end:
                pass
            return x[:, :3]

    slow = Slow()
    inputs = INPUTS.repeat(10, 1)
    report = match(mlp(3), [slow, mlp(1)], inputs, Match(seconds=0.6))
    assert report.seconds < 1.3 * 0.6
    assert slow.calls < 10
    assert report.pool < len(inputs)
    assert report.steps > 5


def test_a_budget_that_is_no_step_is_refused_with_the_number_that_would_do():
    module = mlp(3)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(OptionError, match="1e-06 seconds are too few for one step") as caught:
        match(module, [mlp(1), mlp(2)], INPUTS, Match(seconds=1e-6))
    enough = float(re.search(r"seconds=([\d.]+)", caught.value.how)[1])
    assert all(torch.equal(module.state_dict()[name], old) for name, old in before.items())
    # A busy machine takes several times as long for the same step.
    assert match(module, [mlp(1), mlp(2)], INPUTS, Match(seconds=10 * enough)).steps >= 1


@pytest.mark.parametrize(("seconds", "sizes"), [(0.0, [2, 4, 8, 8, 8, 7]), (1.0, [2] * 17 + [3])])
def test_members_are_asked_about_more_inputs_at_once_where_that_is_quick(
    seconds, sizes, monkeypatch
):
    now = [0.0]
    monkeypatch.setattr("fxfuse.refine.pool.time.process_time", lambda: now[0])
    teacher = Teacher([], Classification(), None, 8, 0, torch.device("cpu"))
    found = []
    for chosen in teacher._growing(torch.arange(37), patience=0.5):
        found.append(chosen)
        now[0] += seconds
    assert [len(chosen) for chosen in found] == sizes
    assert torch.equal(torch.cat(found), torch.arange(37))


@pytest.mark.parametrize(
    ("least", "each", "batch"), [(0.02, 1e-4, 64), (0.02, 2e-3, 32), (1.0, 2e-3, 2)]
)
def test_the_batch_is_as_large_as_the_seconds_allow(least, each, batch, monkeypatch):
    """A step costs something however few the inputs, and those beyond 16 cost more."""
    trainer = SimpleNamespace(pool=SimpleNamespace(size=500))
    trainer.cost = lambda n: (max(least, each * (n - 16)) / n, 1.0)
    monkeypatch.setattr("fxfuse.refine.schedule.time.process_time", lambda: 0.0)
    assert _batch(trainer, Budget(None, 5.0), 0.0) == batch


class Rates(torch.optim.AdamW):
    """Notes the learning rate of each step."""

    seen: ClassVar[list[float]] = []

    def step(self, closure=None):
        self.seen.append(self.param_groups[0]["lr"])
        return super().step(closure)


def rates_of(monkeypatch, module, **options):
    monkeypatch.setattr(torch.optim, "AdamW", Rates)
    Rates.seen.clear()
    match(module, [mlp(1), mlp(2)], INPUTS, Match(**options))
    return list(Rates.seen)


def test_short_trials_find_the_rate(monkeypatch):
    """From a start that is close the rates that are too high lead away, and are not taken."""
    close = mlp(1)
    with torch.no_grad():
        close[4].weight += 1e-3 * torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    near = match(close, [mlp(1)], INPUTS, Match(steps=100))
    far = match(mlp(3), [mlp(1), mlp(2)], INPUTS, Match(steps=100))
    for report in (near, far):
        tried = [rate for rate, _ in report.trials]
        assert set(tried) <= {3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5}
        assert report.learning_rate in tried
        # Each rate led somewhere else, so they were judged apart, from one start.
        assert len({distance for _, distance in report.trials}) == len(tried)
    assert near.learning_rate < far.learning_rate == 3e-3
    assert near.kept
    assert near.after < near.before


def test_a_rate_that_is_asked_for_is_taken(monkeypatch):
    asked = rates_of(monkeypatch, mlp(3), steps=100, learning_rate=1e-3)
    assert max(asked) == pytest.approx(1e-3, rel=0.02)
    # The trials of 25 steps with statistics frozen and not frozen, and the run.
    assert len(asked) == 100 + 2 * 25
    assert len(rates_of(monkeypatch, mlp(3), steps=100, learning_rate=1e-3, freeze=True)) == 100


def test_the_rate_rises_over_ten_steps_at_least_and_falls_to_nothing(monkeypatch):
    rates = rates_of(monkeypatch, mlp(3), steps=40, learning_rate=1.0, freeze=True)
    assert rates[0] == pytest.approx(0.1)
    assert rates[5] < 0.6
    assert rates[-1] < 0.02
    assert rates == sorted(rates[:11]) + sorted(rates[11:], reverse=True)


class Copied(nn.Module):
    """A member, and what it does to its weights as soon as it is trained: it forgets."""

    def __init__(self, member, harm):
        super().__init__()
        self.inner, self.harm = copy.deepcopy(member), harm

    def forward(self, x):
        if self.training:
            with torch.no_grad():
                for parameter in self.inner.parameters():
                    parameter.add_(self.harm * torch.randn_like(parameter))
        return self.inner(x)


@pytest.mark.parametrize(
    ("task", "make"), [(Classification(), mlp), (Regression(), mlp), (Classification(), cnn)]
)
def test_training_that_does_harm_is_taken_back(task, make):
    inputs = IMAGES if make is cnn else INPUTS
    module = Copied(make(1), harm=0.3)
    module.inner[0].weight.data *= 1.05
    before = copy.deepcopy(module.state_dict())
    report = match(module, [make(1)], inputs, Match(steps=10, freeze=False), task=task)
    assert not report.kept
    assert 0 < report.after == report.before
    after = module.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_the_trials_find_out_that_training_mode_does_harm():
    module = Copied(mlp(1), harm=0.3)
    module.inner[0].weight.data *= 1.05
    report = match(module, [mlp(1)], INPUTS, Match(steps=60))
    assert report.frozen
    assert report.kept
    assert report.after < report.before


def test_a_state_on_the_way_is_kept_where_the_end_went_too_far():
    """Every step goes on in one direction: half-way it is at the target, and then beyond it."""
    start = nn.Linear(6, 3)
    target = copy.deepcopy(start)
    target.weight.data += 0.1

    class Far(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.steps = copy.deepcopy(start), 0

        def forward(self, x):
            if self.training:
                self.steps += 1
                self.inner.weight.data = start.weight.data + 0.0025 * self.steps
            return self.inner(x)

    module, options = Far(), Match(steps=80, learning_rate=1e-9, freeze=False)
    report = match(module, [target], INPUTS, options, task=Regression())
    assert module.steps == report.steps == 80
    assert report.kept
    assert report.after < 0.01 * report.before
    torch.testing.assert_close(module.inner.weight, target.weight, rtol=0, atol=1e-4)


@pytest.mark.parametrize("make", [mlp, cnn])
def test_a_network_that_equals_the_ensemble_stays_as_good(make):
    module, inputs = make(1), IMAGES if make is cnn else INPUTS
    wanted = mean_of([module], inputs)
    report = match(module, [make(1), make(1)], inputs, Match(steps=60))
    # Nats, each rounded as float32 is.
    assert report.after <= report.before < 1e-9
    torch.testing.assert_close(mean_of([module], inputs), wanted, rtol=0, atol=1e-4)
    # The oracle sees: another start is told from the ensemble, and comes closer.
    other = match(make(2), [make(1), make(1)], inputs, Match(steps=60))
    assert 0 < other.after < 0.7 * other.before


def run(seed, outside, **options):
    module, members = cnn(3), [cnn(1), cnn(2)]
    torch.manual_seed(outside)
    state = torch.get_rng_state()
    report = match(module, members, IMAGES, Match(steps=25, batch=8, seed=seed, **options))
    assert torch.equal(torch.get_rng_state(), state)
    return module.state_dict(), report


def test_a_seed_reproduces_a_run_bit_for_bit():
    (one, first), (two, second), (other, _) = run(4, 0), run(4, 1), run(5, 0)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert (first.first_loss, first.last_loss) == (second.first_loss, second.last_loss)
    assert not torch.equal(one["0.weight"], other["0.weight"])


def test_the_pool_holds_copies_of_images_and_no_more_than_is_used():
    # Of 40 images 8 judge; each of the 200 entries drawn is drawn about three times.
    assert 2 * 32 < run(0, 0)[1].pool < 100
    assert match(cnn(3), [cnn(1)], IMAGES, Match(steps=200, batch=16)).pool == 12 * 32
    assert match(cnn(3), [cnn(1)], IMAGES, Match(steps=2, batch=16)).pool < 2 * len(IMAGES)


def test_own_augmentation_is_used():
    seen = []

    def augment(inputs, generator):
        seen.append(inputs.shape)
        return inputs + 0.1 * torch.randn(inputs.shape, generator=generator)

    report = match(mlp(3), [mlp(1), mlp(2)], INPUTS, Match(steps=20, augment=augment))
    # A third of 20 steps on 64 inputs, of 96 that are not held out.
    assert 20 * 64 / 3 <= report.pool < 20 * 64 / 3 + 64
    assert seen
    assert all(shape[1:] == (6,) for shape in seen)


def test_shift_and_mix_shifts_by_one_and_mixes_half():
    images = torch.arange(5.0 * 6).reshape(1, 1, 5, 6).repeat(200, 1, 1, 1)
    images += 1000 * torch.arange(200.0).reshape(-1, 1, 1, 1)
    copies = shift_and_mix(images, torch.Generator().manual_seed(0))
    assert copies.shape == images.shape
    centre = copies[:, 0, 2, 2] - images[:, 0, 2, 2]
    moves = {dy * 6 + dx for dy in (-1, 0, 1) for dx in (-1, 0, 1)}
    moved = [float(value) in moves for value in centre]
    assert 100 <= sum(moved) <= 102  # a mixed image may look shifted by chance
    assert {float(value) for value in centre if float(value) in moves} == moves
    assert copies.min() >= images.min()
    assert copies.max() <= images.max()
    signal = shift_and_mix(torch.rand(7, 2, 9), torch.Generator().manual_seed(0))
    assert signal.shape == (7, 2, 9)


def test_integer_inputs_and_outputs_per_position():
    """Sequences of tokens: nothing is augmented, and every position is compared as it is."""

    def language(seed):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 11))

    tokens = torch.randint(11, (60, 5), generator=torch.Generator().manual_seed(0))
    members, module = [language(1), language(2)], language(3)
    report = match(module, members, tokens, Match(steps=200, learning_rate=3e-2))
    assert report.pool == 48
    difference = module(tokens).detach() - mean_of(members, tokens)
    assert float(difference.square().mean()) < 0.05


def test_values_are_matched_as_they_are_and_logits_up_to_a_constant():
    members = [mlp(1), mlp(2)]
    wanted = mean_of(members, INPUTS)

    def matched(task=None):
        module = mlp(3)
        module[4].bias.data += 5
        match(module, members, INPUTS, Match(steps=200, learning_rate=1e-2), task=task)
        with torch.no_grad():
            return (module(INPUTS) - wanted).mean().abs()

    assert matched() > 3
    assert matched(Regression()) < 3


def test_one_output_per_input_is_a_value():
    report = match(mlp(3, 1), [mlp(1, 1), mlp(2, 1)], INPUTS, Match(steps=50))
    assert report.kept
    assert report.last_loss < report.first_loss
    same = match(mlp(3, 1), [mlp(1, 1), mlp(2, 1)], INPUTS, Match(steps=50), task=Regression())
    assert (report.before, report.after) == (same.before, same.after)


def test_several_inputs_and_an_output_with_a_field_of_logits():
    class Answer(dict):
        logits = property(lambda self: self["logits"])

    class Two(nn.Module):
        def __init__(self, seed):
            super().__init__()
            torch.manual_seed(seed)
            self.head = nn.Linear(12, 3)

        def forward(self, a, b):
            return Answer(logits=self.head(torch.cat([a, b], dim=1)))

    pair = (INPUTS, INPUTS.flip(0))
    report = match(Two(3), [Two(1), Two(2)], pair, Match(steps=100, learning_rate=1e-2))
    assert report.last_loss < 0.2 * report.first_loss


def test_a_fused_network_is_matched():
    members = [cnn(1), cnn(2)]
    module = fxfuse.fuse(members, IMAGES[:4]).module
    images = torch.randn(200, 1, 6, 6, generator=torch.Generator().manual_seed(3))
    report = match(module, members, images, Match(steps=80, freeze=False))
    assert report.last_loss < 0.5 * report.first_loss
    assert report.kept
    assert report.after < 0.5 * report.before
    assert module.get_buffer("1.num_batches_tracked") > 0


def test_frozen_parameters_stay():
    module = mlp(3)
    module[0].weight.requires_grad_(False)
    before = module[0].weight.clone()
    match(module, [mlp(1), mlp(2)], INPUTS, Match(steps=5))
    assert torch.equal(module[0].weight, before)


def test_losses_are_told_to_a_function():
    told = []
    log = Match(steps=45, learning_rate=1e-3, log=lambda step, loss: told.append((step, loss)))
    report = match(mlp(3), [mlp(1), mlp(2)], INPUTS, log)
    assert [step for step, _ in told] == [20, 40, 45]
    assert told[-1][1] == pytest.approx(report.last_loss)


def test_own_progress_display():
    rich = pytest.importorskip("rich.progress")
    with rich.Progress(disable=True) as progress:
        match(mlp(3), [mlp(1), mlp(2)], INPUTS, Match(steps=5), progress=progress)
        assert not progress.tasks


def test_divergence_names_the_step():
    class Breaks(nn.Module):
        calls = 0

        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(6, 3)

        def forward(self, x):
            self.calls += self.training
            return self.inner(x) * (float("nan") if self.calls == 7 else 1.0)

    options = Match(steps=30, learning_rate=1e-3, freeze=False)
    with pytest.raises(RefineError, match="at step 7"):
        match(Breaks(), [mlp(1), mlp(2)], INPUTS, options)


def broken(seed):
    module = mlp(seed)
    module[4].bias.data[0] = float("nan")
    return module


SELF = mlp(7)
BAD = {
    "no members": (mlp(3), [], INPUTS, {}, MemberError, "no members"),
    "its own member": (SELF, [mlp(1), SELF], INPUTS, {}, MemberError, "its own members"),
    "no inputs": (
        mlp(3),
        [mlp(1)],
        INPUTS[:0],
        {},
        InputError,
        "at least 2 inputs are needed, got 0",
    ),
    "an empty tuple": (mlp(3), [mlp(1)], (), {}, InputError, "not tensors"),
    "a scalar": (mlp(3), [mlp(1)], torch.tensor(1.0), {}, InputError, "not tensors"),
    "unlike lengths": (mlp(3), [mlp(1)], (INPUTS, INPUTS[1:]), {}, InputError, "differ in length"),
    "another shape": (mlp(3), [mlp(1)], INPUTS[:, :5], {}, InputError, "member 0 rejects"),
    "another dtype": (mlp(3), [mlp(1)], INPUTS.double(), {}, InputError, "member 0 rejects"),
    "both budgets": (
        mlp(3),
        [mlp(1)],
        INPUTS,
        {"steps": 1, "seconds": 1},
        OptionError,
        "steps and seconds contradict",
    ),
    "no steps": (
        mlp(3),
        [mlp(1)],
        INPUTS,
        {"steps": 0},
        OptionError,
        "steps must be above 0, got 0",
    ),
    "no seconds": (
        mlp(3),
        [mlp(1)],
        INPUTS,
        {"seconds": -1.0},
        OptionError,
        "seconds must be above 0, got -1",
    ),
    "seconds NaN": (
        mlp(3),
        [mlp(1)],
        INPUTS,
        {"seconds": float("nan")},
        OptionError,
        "seconds must be above 0, got nan",
    ),
    "batch": (
        mlp(3),
        [mlp(1)],
        INPUTS,
        {"batch": 1},
        OptionError,
        "batch must be at least 2, got 1",
    ),
    "rate": (
        mlp(3),
        [mlp(1)],
        INPUTS,
        {"learning_rate": 0.0},
        OptionError,
        "learning_rate must be above 0, got 0",
    ),
    "no classes": (
        mlp(3, 1),
        [mlp(1, 1)],
        INPUTS,
        {"task": Classification()},
        OptionError,
        "Classification does not fit an output",
    ),
    "members unlike": (
        mlp(3),
        [mlp(1), mlp(2, 4)],
        INPUTS,
        {},
        MemberError,
        r"member 1 \[\d+, 4\]",
    ),
    "module unlike": (mlp(3, 4), [mlp(1)], INPUTS, {}, MemberError, r"module \[\d+, 4\]"),
    "members NaN": (mlp(3), [mlp(1), broken(2)], INPUTS, {}, InputError, "member 1 answers NaN"),
    "no task": (mlp(3), [mlp(1)], INPUTS, {"task": "classes"}, OptionError, "unknown task"),
    "no batch": (mlp(3), [nn.Flatten(0)], INPUTS, {}, MemberError, "output of its own"),
    "nothing to train": (
        mlp(3).requires_grad_(False),
        [mlp(1)],
        INPUTS,
        {},
        RefineError,
        "nothing to train",
    ),
    "augment of two": (
        mlp(3),
        [mlp(1)],
        (INPUTS, INPUTS),
        {"augment": lambda x, generator: x},
        OptionError,
        "augment works with one input tensor, got 2",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    module, members, inputs, given, kind, message = BAD[name]
    options = dict(given)
    task = options.pop("task", None)
    with pytest.raises(FxfuseError, match=message) as caught:
        match(module, members, inputs, Match(**options), task=task)
    assert type(caught.value) is kind
