"""Fine-tuning and distillation."""

from __future__ import annotations

import copy
import io
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from fxfuse.cli.data import Batches
from fxfuse.errors import (
    FxfuseError,
    InputError,
    MemberError,
    OptionError,
    RefineError,
)
from fxfuse.refine import default_optimizer, distill, finetune

INPUTS = torch.randn(50, 6, generator=torch.Generator().manual_seed(1))
LABELS = INPUTS[:, :3].argmax(dim=1)
QUIET = {"progress": False}


def network(seed=0):
    """Batch normalisation and dropout: state and random numbers."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3)
    ).eval()


def batches(size=10):
    return list(zip(INPUTS.split(size), LABELS.split(size), strict=True))


def assert_same_state(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def test_finetune_learns_and_updates_running_statistics():
    module = network()
    optimizer, scheduler = default_optimizer(module, 60, lr=1e-2)
    report = finetune(
        module, batches(), steps=60, optimizer=optimizer, scheduler=scheduler, **QUIET
    )
    assert report.steps == len(report.losses) == 60
    assert (report.first_loss, report.last_loss) == (report.losses[0], report.losses[-1])
    assert sum(report.losses[-5:]) < 0.6 * sum(report.losses[:5])
    assert (module(INPUTS).argmax(dim=1) == LABELS).float().mean() > 0.75  # a third by guessing
    assert report.seconds > 0
    assert module[1].num_batches_tracked == 60
    assert not any(part.training for part in module.modules())


FRESH = network()

LOADERS = {
    "list": batches,
    "Batches": lambda: Batches(INPUTS, LABELS, 10, seed=2),
    "DataLoader": lambda: DataLoader(TensorDataset(INPUTS, LABELS), batch_size=10, shuffle=True),
    "DataLoader with a generator": lambda: DataLoader(
        TensorDataset(INPUTS, LABELS),
        batch_size=10,
        shuffle=True,
        generator=torch.Generator().manual_seed(7),
    ),
}


def _sgd(module, steps):
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    return optimizer, torch.optim.lr_scheduler.MultiStepLR(optimizer, [4, 9])


@pytest.mark.parametrize("loader", LOADERS)
def test_global_random_numbers_are_neither_used_nor_changed(loader):
    states = []
    for outside in (5, 6):
        torch.manual_seed(outside)
        before = torch.get_rng_state()
        module = copy.deepcopy(FRESH)
        finetune(module, LOADERS[loader](), steps=12, **QUIET)
        assert torch.equal(torch.get_rng_state(), before)
        states.append(module.state_dict())
    assert_same_state(*states)


def test_a_loader_that_counts_its_passes_starts_over_in_each_run():
    loader = Batches(INPUTS, LABELS, 10, seed=2)
    first, second = network(), network()
    finetune(first, loader, steps=12, **QUIET)
    finetune(second, loader, steps=12, **QUIET)
    assert_same_state(first.state_dict(), second.state_dict())


def test_distillation_without_labels_comes_closer_to_the_ensemble():
    teachers = [network(1), network(2).eval()]
    before = [copy.deepcopy(teacher.state_dict()) for teacher in teachers]

    def divergence(module):
        with torch.no_grad():
            wanted = torch.stack([teacher.eval()(INPUTS) for teacher in teachers]).mean(dim=0)
            student = module.eval()(INPUTS).log_softmax(1)
        target = wanted.log_softmax(1)
        return functional.kl_div(student, target, reduction="sum", log_target=True).item()

    student = network(3)
    start = divergence(student)
    teachers[0].train()
    optimizer, scheduler = default_optimizer(student, 150, lr=1e-2)
    distill(
        student,
        teachers,
        [inputs for inputs, _ in batches()],
        steps=150,
        optimizer=optimizer,
        scheduler=scheduler,
        **QUIET,
    )
    assert [teacher.training for teacher in teachers] == [True, False]
    assert divergence(student) < 0.3 * start
    for teacher, state in zip(teachers, before, strict=True):
        assert_same_state(teacher.state_dict(), state)
        assert all(parameter.grad is None for parameter in teacher.parameters())


def _linear(seed):
    torch.manual_seed(seed)
    return nn.Linear(6, 3)


def test_distillation_loss_is_scaled_kl_to_the_mean_of_the_logits():
    student, teachers = _linear(0), [_linear(1), _linear(2)]
    with torch.no_grad():
        wanted = (teachers[0](INPUTS) + teachers[1](INPUTS)) / 2 / 3
        own = (student(INPUTS) / 3).log_softmax(1)
    expected = 9 * (wanted.softmax(1) * (wanted.log_softmax(1) - own)).sum(1).mean()
    pairs = [(INPUTS, LABELS)]
    report = distill(student, teachers, pairs, steps=1, temperature=3.0, **QUIET)
    assert report.first_loss == pytest.approx(expected.item(), rel=1e-5)


def test_classes_may_stand_in_the_last_dimension():
    student, teacher = _linear(0), _linear(1)
    tokens = INPUTS.reshape(10, 5, 6)
    flat = distill(copy.deepcopy(student), [teacher], [INPUTS], steps=1, **QUIET)
    per_token = distill(student, [teacher], [tokens], steps=1, class_dim=-1, **QUIET)
    assert per_token.first_loss == pytest.approx(flat.first_loss, rel=1e-5)


class _Sum(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(6, 3)

    def forward(self, a, b):
        return self.linear(a + b)


@pytest.mark.parametrize(
    "inputs", [(INPUTS, INPUTS), [INPUTS, INPUTS], {"b": INPUTS, "a": INPUTS}], ids=type
)
def test_inputs_may_be_a_tuple_or_a_dict(inputs):
    module = _Sum()
    expected = functional.cross_entropy(module(INPUTS, INPUTS), LABELS).item()
    report = finetune(module, [(inputs, LABELS)], steps=1, **QUIET)
    assert report.first_loss == pytest.approx(expected)


def test_callers_optimizer_schedule_and_loss_are_used():
    module = _linear(0)
    before = copy.deepcopy(module.state_dict())
    optimizer = torch.optim.SGD([module.bias], lr=0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    report = finetune(
        module,
        [(INPUTS, LABELS)],
        steps=2,
        optimizer=optimizer,
        scheduler=scheduler,
        loss=lambda output, labels: output.sum(dim=1).mean(),
        **QUIET,
    )
    # The gradient of every bias is 1, so the two steps are 0.5 and 0.25.
    torch.testing.assert_close(module.bias.detach(), before["bias"] - 0.75)
    assert torch.equal(module.weight.detach(), before["weight"])
    assert report.first_loss - report.last_loss == pytest.approx(1.5, rel=1e-4)
    assert scheduler.last_epoch == 2


def test_losses_are_read_once_in_many_steps():
    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += function is torch.ops.aten._local_scalar_dense.default
            return function(*args, **(kwargs or {}))

    def reads(steps):
        module = _linear(0)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
        with Reads() as counter:
            finetune(module, batches(), steps=steps, optimizer=optimizer, **QUIET)
        return counter.count

    assert reads(61) - reads(1) <= 3


def test_a_given_progress_display_gets_a_task_and_loses_it():
    rich = pytest.importorskip("rich.progress")
    display = rich.Progress(console=rich.Console(file=io.StringIO()))
    seen = []
    display.update = lambda task, **fields: seen.append(fields)
    finetune(_linear(0), batches(), steps=30, progress=display)
    assert [fields["completed"] for fields in seen] == [20, 30]
    assert "loss" in seen[-1]["description"]
    assert display.tasks == []


def test_own_progress_bar_goes_to_stderr(capsys):
    finetune(_linear(0), batches(), steps=3)
    program = capsys.readouterr()
    assert program.out == ""
    assert "fine-tuning" in program.err


def test_progress_without_rich_is_a_line_after_each_tenth(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    finetune(_linear(0), batches(), steps=100)
    program = capsys.readouterr()
    assert program.out == ""
    lines = program.err.splitlines()
    assert [line.split(", loss ")[0] for line in lines] == [
        f"fine-tuning: {percent} %" for percent in (20, 40, 60, 80, 100)
    ]


def test_one_shot_iterator_that_ends_early():
    module = network()
    with pytest.raises(InputError, match="ran out after 5 steps") as caught:
        finetune(module, iter(batches()), steps=6, **QUIET)
    assert "list" in caught.value.how
    assert not module.training
    assert finetune(network(), iter(batches()), steps=5, **QUIET).steps == 5


BAD_CALLS = {
    "no batches": (lambda: finetune(_linear(0), [], steps=1, **QUIET), InputError, "no batches"),
    "no labels": (
        lambda: finetune(_linear(0), [INPUTS], steps=1, **QUIET),
        InputError,
        "no labels",
    ),
    "three items": (
        lambda: finetune(_linear(0), [(INPUTS, INPUTS, LABELS)], steps=1, **QUIET),
        InputError,
        "tuple of 3 items",
    ),
    "no steps": (
        lambda: finetune(_linear(0), batches(), steps=0, **QUIET),
        OptionError,
        "steps must be at least 1, got 0",
    ),
    "optimizer of another module": (
        lambda: finetune(_linear(0), batches(), steps=1, optimizer=_sgd(_linear(0), 1)[0], **QUIET),
        OptionError,
        "no parameter of this module",
    ),
    "schedule alone": (
        lambda: finetune(_linear(0), batches(), steps=1, scheduler=_sgd(_linear(0), 1)[1], **QUIET),
        OptionError,
        "scheduler needs its optimizer",
    ),
    "frozen": (
        lambda: finetune(_linear(0).requires_grad_(False), batches(), steps=1, **QUIET),
        RefineError,
        "nothing to train",
    ),
    "no logits": (
        lambda: finetune(nn.LSTM(6, 3), batches(), steps=1, **QUIET),
        MemberError,
        "no logits",
    ),
    "no teachers": (
        lambda: distill(_linear(0), [], batches(), steps=1, **QUIET),
        MemberError,
        "no teachers",
    ),
    "own teacher": (
        lambda: distill((module := _linear(0)), [module], batches(), steps=1, **QUIET),
        MemberError,
        "its own teachers",
    ),
    "temperature": (
        lambda: distill(_linear(0), [_linear(1)], batches(), steps=1, temperature=0.0, **QUIET),
        OptionError,
        "temperature must be above 0, got 0",
    ),
    "other classes": (
        lambda: distill(_linear(0), [nn.Linear(6, 4)], batches(), steps=1, **QUIET),
        MemberError,
        "different shapes",
    ),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls_say_what_and_how(case):
    call, kind, what = BAD_CALLS[case]
    with pytest.raises(FxfuseError, match=what) as caught:
        call()
    assert type(caught.value) is kind
    assert caught.value.where
    assert caught.value.why
    assert caught.value.how


def test_loss_that_is_not_finite_stops_the_run():
    broken = batches()
    broken[2] = (broken[2][0] * float("nan"), broken[2][1])
    with pytest.raises(RefineError, match="nan at step 3"):
        finetune(network(), broken, steps=9, **QUIET)


def test_weights_that_the_last_step_broke_are_not_handed_over():
    module = _linear(0)
    optimizer = torch.optim.SGD(module.parameters(), lr=float("inf"))
    with pytest.raises(RefineError, match="weight became infinite"):
        finetune(module, batches(), steps=1, optimizer=optimizer, **QUIET)
