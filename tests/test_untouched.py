"""Oracle 6: whatever looks at networks leaves them as they were, whatever they do in `forward`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

import fxfuse
from fxfuse import Constraints, Match, Refit, Regression, Size, verify
from fxfuse.activations.calibration import CalibrationBatches
from fxfuse.refine import match, recalibrate, refit, repair
from fxfuse.refine.judge import ask_members
from tests.nets import SmallResNet
from tests.options import unjudged


class MovingAverage(nn.Module):
    """Centres its features by a moving average, and counts its runs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 3)
        self.register_buffer("mean", torch.zeros(16))
        self.register_buffer("runs", torch.zeros((), dtype=torch.long))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x).relu()
        self.mean.mul_(0.9).add_(h.mean(0).detach(), alpha=0.1)
        self.runs += 1
        return self.last(h - self.mean)


class Cache(nn.Module):
    """Attends to the keys of earlier runs: a buffer that is assigned anew."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.last = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3)
        self.register_buffer("keys", torch.zeros(5, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.keys = torch.cat([self.keys[1:], self.key(x).mean(0, keepdim=True)])
        weights = (self.query(x) @ self.keys.T).softmax(-1)
        return self.last((weights @ self.keys + self.query(x)).relu())


class Streaming(nn.Module):
    """The end of the last input comes before this one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv1d(3, 8, 3), nn.Conv1d(8, 4, 1)
        self.register_buffer("before", torch.zeros(1, 3, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        whole = torch.cat([self.before.expand(x.shape[0], -1, -1), x], 2)
        self.before.copy_(x[:1, :, -2:])
        return self.last(self.first(whole).relu()).mean(-1)


class Queue(nn.Module):
    """A queue with a pointer that Python reads, so torch.export rejects it; beside it, layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 3)
        self.register_buffer("queue", torch.randn(4, 3))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.long))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.last(self.first(x).relu())
        mean, place = self.queue.mean(0), int(self.pointer)
        self.queue[place] = y.mean(0).detach()
        self.pointer[0] = (place + 1) % 4
        return y + mean


class Notes(nn.Module):
    """Writes into its input, its attributes and a list, and draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 3)
        self.seen: list[torch.Tensor] = []
        self.runs, self.newest = 0, None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.runs += 1
        x.mul_(0.5)
        h = self.first(x).relu()
        self.seen.append(h.detach())
        self.newest = h
        torch.rand(2)
        return self.last(h)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "moving average": (MovingAverage, (6,)),
    "cache": (Cache, (6,)),
    "streaming": (Streaming, (3, 7)),
    "queue": (Queue, (6,)),
    "notes": (Notes, (6,)),
    "ResNet": (SmallResNet, (3, 8, 8)),
}


def members_of(name: str) -> list[nn.Module]:
    """Members in both modes; one of those that count in buffers has run before."""
    torch.manual_seed(0)
    build, shape = NETWORKS[name]
    members = [build() for _ in range(2)]
    members[0].eval()
    if list(members[1].buffers()):
        members[1].eval()
        with torch.no_grad():
            members[1](torch.randn(4, *shape))
        members[1].train()
    return members


@contextmanager
def untouched(*given: nn.Module | torch.Tensor) -> Iterator[None]:
    """Check that networks, tensors and the random state are bit for bit what they were."""

    def looked_at() -> list[object]:
        found: list[object] = [torch.get_rng_state()]
        for each in given:
            if isinstance(each, torch.Tensor):
                found.append(each.clone())
                continue
            for part in each.modules():
                found += [part.training, getattr(part, "runs", 0), len(getattr(part, "seen", ()))]
                found.append(getattr(part, "newest", None))
            found += [tensor.detach().clone() for tensor in each.state_dict().values()]
        return found

    before = looked_at()
    yield
    for number, (old, new) in enumerate(zip(before, looked_at(), strict=True)):
        same = torch.equal(old, new) if isinstance(old, torch.Tensor) else old == new
        assert same, (number, old, new)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NETWORKS)
def test_members_are_left_as_they_were(name: str, tmp_path: Path):
    members, shape = members_of(name), NETWORKS[name][1]
    example, inputs = torch.randn(3, *shape), torch.randn(40, *shape)
    options = {"calibration": unjudged(inputs), "task": Regression()}
    constraints = Constraints(base_member=0)
    with untouched(*members, example, inputs):
        fxfuse.analyze(members[0], example)
        result = fxfuse.fuse(members, example, constraints=constraints)
        fxfuse.save(result, tmp_path / "saved")
        verify.permutation(members[1], example)
        if result.emitted:
            fxfuse.fuse(members, example, refine=[Refit(), Match(steps=2)], **options)
            fxfuse.fuse(members, example, size=0.5, refine=[Refit()], **options)
            fxfuse.prune(members[1], example, size=0.5)
            fxfuse.stack(members, example)
            ask_members(Regression(), members, CalibrationBatches.plain(inputs, 16))
            refit(result, members, inputs)
            repair(result, members, inputs)
            match(result.module, members, inputs, Match(steps=2))


@pytest.mark.parametrize("name", ["moving average", "cache", "streaming"])
def test_a_fused_network_starts_with_the_members_state(name: str):
    torch.manual_seed(0)
    build, shape = NETWORKS[name]
    members, example = [build().eval() for _ in range(2)], torch.randn(3, *shape)
    inputs = torch.randn(40, *shape)
    result = fxfuse.fuse(members, example)
    fxfuse.compile(result, backend="eager")
    for _ in range(2):
        state = dict(result.module.named_buffers())
        assert state
        assert all(not state[n].any() for n, _ in members[0].named_buffers())
        match(result.module, members, inputs, Match(steps=3))
    assert result.verification.passed


@pytest.mark.parametrize("name", ["moving average", "cache", "streaming"])
def test_a_network_that_has_run_is_compared_from_its_own_state(name: str):
    members, example = members_of(name), torch.randn(3, *NETWORKS[name][1])
    pruned = fxfuse.prune(members[1], example, size=0.5)
    module = pruned.to_module()
    with torch.no_grad():
        torch.testing.assert_close(module.eval()(example), pruned.module(example))
    fxfuse.stack(members, example)
    assert fxfuse.compile(pruned, backend="aot_eager").report.error < 1e-5


def test_statistics_are_all_that_recalibration_changes():
    torch.manual_seed(0)
    members, inputs = members_of("moving average"), torch.randn(40, 6)
    with untouched(members[1], inputs):
        assert recalibrate(members[1], inputs) == ()


def test_the_state_of_runs_is_wider_in_a_wider_network():
    members, example = members_of("moving average"), torch.randn(3, 6)
    wide = fxfuse.fuse(members, example, size=Size(2.0))
    each = torch.cat([member.mean for member in members])
    assert torch.equal(wide.module.mean.sort().values, each.sort().values)
