"""Two processes fuse members that are spread over them, and train networks, as one does."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import fxfuse
from fxfuse import Match, Members
from fxfuse.errors import (
    CheckpointError,
    MemberError,
    OptionError,
    RefineError,
)
from fxfuse.members.streamed import Stored
from fxfuse.refine import distill, finetune, match
from fxfuse.refine.stream import BatchStream
from tests.nets import images, resnets
from tests.options import flat
from tests.pair import Processes
from tests.test_streamed import Tied, saved

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def pair() -> Iterator[Processes]:
    """Two processes of one group."""
    processes = Processes(2)
    yield processes
    processes.close()


class Normalised(nn.Module):
    """An MLP with LayerNorm, which mixes members in a wide model."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(6, width), nn.LayerNorm(width)
        self.second, self.last = nn.Linear(width, width), nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.second(self.norm(self.first(x)).relu()).relu())


def fused(members: list[Any], x: torch.Tensor, options: dict[str, Any]) -> dict[str, Any]:
    """What a fusion gives, as far as it can be sent; runs on each rank."""
    told = dict(options)
    given = fxfuse.Members.on_ranks(members, template=told.pop("template", None))
    plan = told.pop("plan", None)
    result = fxfuse.fuse(given, x, **flat(**told)) if plan is None else fxfuse.build(plan, given, x)
    return {
        "plan": result.plan.to_json(),
        "state": result.state_dict(),
        "verification": result.verification,
        "answer": result.module(x).detach(),
        # Members that run one by one do not fit into their class.
        "own": None if result.plan.names_of("per_member") else result.to_module()(x).detach(),
    }


def split(members: Sequence[Any], counts: Sequence[int]) -> list[list[Any]]:
    """The first members for rank 0, the next ones for rank 1."""
    return [list(members[: counts[0]]), list(members[counts[0] :])]


def check_same(
    pair: Processes,
    members: Sequence[nn.Module],
    given: Sequence[Any],
    x: torch.Tensor,
    options: dict[str, Any],
    counts: Sequence[int] = (2, 1),
    templates: Sequence[nn.Module | None] = (None, None),
) -> None:
    expected = fxfuse.fuse(list(members), x, **flat(**options))
    each = [{**options, **({} if t is None else {"template": t})} for t in templates]
    # The inputs of the rank that has member 0 count.
    inputs = [x, x] if not counts[0] else [x, torch.zeros_like(x)]
    for number, (well, found) in enumerate(pair.run(fused, split(given, counts), inputs, each)):
        assert well, found
        assert found["plan"] == expected.plan.to_json()
        assert found["verification"] == expected.verification
        state = expected.state_dict()
        assert list(found["state"]) == list(state)
        assert all(torch.equal(found["state"][name], state[name]) for name in state)
        assert torch.equal(found["answer"], expected.module(inputs[number]))
        if not expected.plan.names_of("per_member"):
            assert torch.equal(found["own"], expected.to_module()(inputs[number]))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"score": "l1", "width": 0.5},
        {"score": "bn_scale", "width": 1.5},
        {"width": 3},
        {"method": "average"},
        {"variant": "iterative", "freeze": ["stem.*"], "base_member": 2},
        {"width": 0.5, "allocation": "auto"},
        {"fraction": 0.5, "base_member": 1, "max_params": 1500},
    ],
    ids=str,
)
def test_files(pair: Processes, tmp_path: Path, options: dict[str, Any]):
    members = resnets(3)
    with torch.device("meta"):
        template = type(members[0])().eval()
    paths = saved(tmp_path, members, "safetensors")
    check_same(pair, members, paths, images(), options, templates=[template, template])


@pytest.mark.parametrize("counts", [(0, 3), (1, 2), (3, 0)], ids=str)
def test_any_number_of_members_on_a_rank(pair: Processes, tmp_path: Path, counts: tuple[int, int]):
    members = [Tied(), Tied(), Tied()]
    paths = saved(tmp_path, members, "pt")
    x = torch.randint(0, 20, (2, 5))
    check_same(pair, members, paths, x, {}, counts, [Tied(), Tied()])


@pytest.mark.parametrize("options", [{}, {"width": 3}, {"method": "average"}], ids=str)
def test_modules(pair: Processes, options: dict[str, Any]):
    members = [Normalised().eval() for _ in range(3)]
    check_same(pair, members, members, torch.randn(4, 6), options)


def test_half_precision(pair: Processes):
    members = [Normalised().eval().bfloat16() for _ in range(3)]
    check_same(pair, members, members, torch.randn(4, 6).bfloat16(), {})


def test_a_plan_is_applied(pair: Processes, tmp_path: Path):
    members = [Normalised().eval() for _ in range(3)]
    x = torch.randn(4, 6)
    plan = fxfuse.fuse(members, x, size=0.5).plan
    expected = fxfuse.build(plan, members, x).state_dict()
    for well, found in pair.run(fused, split(members, (1, 2)), [x, x], [{"plan": plan}] * 2):
        assert well, found
        assert all(torch.equal(found["state"][name], expected[name]) for name in expected)


def most_read(members: list[Any], x: torch.Tensor, options: dict[str, Any]) -> int:
    """The most elements that were read from files and held at one time; runs on each rank."""
    alive: list[weakref.ref[torch.Tensor]] = []
    most, original = 0, Stored.read

    def read(self: Stored, name: str) -> torch.Tensor:
        nonlocal most
        tensor = original(self, name)
        alive[:] = [ref for ref in alive if ref() is not None]
        alive.append(weakref.ref(tensor))
        most = max(most, sum(ref().numel() for ref in alive))
        return tensor

    Stored.read = read
    try:
        fused(members, x, options)
    finally:
        Stored.read = original
    return most


@pytest.mark.parametrize("method", ["transplant", "average"])
def test_no_rank_holds_its_members(pair: Processes, tmp_path: Path, method: str):
    """Of all but member 0 a rank holds one tensor of each at most."""
    members = resnets(6)
    paths = saved(tmp_path, members, "safetensors")
    options = {"template": copy.deepcopy(members[0]), "method": method}
    found = pair.run(most_read, split(paths, (1, 5)), [images()] * 2, [options] * 2)
    largest = max(t.numel() for t in members[0].state_dict().values())
    assert found[1][0]
    assert found[1][1] <= 5 * largest + largest


class Breaking(nn.Module):
    """Fails on one rank, in the middle of the work."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x).relu())

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        raise MemoryError("no more of it")


def faulty(kind: str, folder: Path) -> tuple[list[list[Any]], list[dict[str, Any]]]:
    """Members and options of two ranks, with one fault on rank 1."""
    members: list[nn.Module] = [Normalised().eval() for _ in range(3)]
    paths = saved(folder, members, "safetensors")
    template: dict[str, Any] = {"template": copy.deepcopy(members[0])}
    options: list[dict[str, Any]] = [dict(template), dict(template)]
    given: list[list[Any]] = split(paths, (2, 1))
    modules: list[list[Any]] = split(members, (2, 1))
    if kind == "missing":
        paths[2].unlink()
    elif kind == "nan":
        with torch.no_grad():
            members[2].last.weight[0, 0] = float("nan")
        given, options = modules, [{}, {}]
    elif kind == "shape":
        given = [paths[:2], [*saved(folder / "other", [Normalised(14).eval()], "safetensors")]]
    elif kind == "width":
        given, options = [members[:2], [Normalised(14).eval()]], [{}, {}]
    elif kind == "constant":
        members = [Tied(False), Tied(False), Tied(False)]
        members[2].order = torch.arange(8)
        given, options = split(members, (2, 1)), [{}, {}]
    elif kind == "no template":
        given, options = [paths[:2], []], [template, {}]
    elif kind == "no template for files":
        options[1] = {}
    elif kind == "template":
        given, options = modules, [{}, template]
    elif kind == "captured":
        given[1] = [fxfuse.capture(members[2], torch.randn(2, 6))]
    elif kind == "method":
        options = [{**template, "method": "weight_matching"}] * 2
    elif kind == "score":
        options = [{**template, "calibration": torch.randn(100, 6), "score": "obs"}] * 2
    elif kind == "heads":
        options = [{**template, "heads": ["last"]}] * 2
    elif kind == "unknown":
        options = [{**template, "method": "magic"}] * 2
    elif kind == "one":
        given = [paths[:1], []]
    elif kind == "crash":
        given, options = [members[:2], [Breaking()]], [{}, {}]
    return given, options


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("missing", CheckpointError, "on rank 1"),
        ("nan", MemberError, "member 2"),
        ("shape", CheckpointError, "on rank 1"),
        ("width", MemberError, "rank 1"),
        ("constant", MemberError, "order"),
        ("no template", OptionError, "no module of the members' class"),
        ("no template for files", OptionError, "template="),
        ("template", OptionError, "leave template= out"),
        ("captured", OptionError, "Program"),
        ("method", OptionError, "one process"),
        ("score", OptionError, "on its own rank"),
        ("heads", OptionError, "on its own rank"),
        ("unknown", OptionError, "magic"),
        ("one", MemberError, "needs at least 2 members, got 1"),
        ("crash", MemberError, "MemoryError: no more of it"),
    ],
)
def test_a_fault_of_one_rank_is_named_on_all(
    pair: Processes, tmp_path: Path, kind: str, error: type[Exception], message: str
):
    (tmp_path / "other").mkdir()
    given, options = faulty(kind, tmp_path)
    x = torch.randn(4, 6) if kind != "constant" else torch.randint(0, 20, (2, 5))
    found = pair.run(fused, given, [x, x], options)
    for rank, (well, raised) in enumerate(found):
        assert not well
        if kind == "crash" and rank == 1:
            assert isinstance(raised, MemoryError)
            continue
        assert isinstance(raised, error), raised
        assert message in str(raised)


INPUTS = torch.randn(64, 6, generator=torch.Generator().manual_seed(1))
LABELS = INPUTS[:, :4].argmax(dim=1)
STEPS = 24


def taught(job: str, module: nn.Module, members: list[nn.Module], part: slice) -> tuple[float, ...]:
    """Losses of a run on this part of every batch."""
    options: dict[str, Any] = {"steps": STEPS, "progress": False}
    batches = [(x[part], y[part]) for x, y in zip(INPUTS.split(16), LABELS.split(16), strict=True)]
    if job == "finetune":
        return finetune(module, batches, **options).losses
    if job == "distill":
        return distill(module, members, batches, **options).losses
    steps = Match(steps=options.pop("steps"), batch=16)
    report = match(module, members, INPUTS, steps, **options)
    return report.first_loss, report.last_loss


def wrapped(module: nn.Module, how: str) -> nn.Module:
    """A module that all ranks train."""
    if how == "ddp":
        return DistributedDataParallel(module)
    if how == "layers":
        for layer in list(module.children()):
            fully_shard(layer)
    return fully_shard(module)


def trained(
    job: str, how: str, module: nn.Module, members: list[nn.Module]
) -> tuple[tuple[float, ...], torch.Tensor]:
    """Losses, and answers of the network; runs on each rank."""
    module, part = wrapped(module, how), slice(dist.get_rank(), None, dist.get_world_size())
    losses = taught(job, module, members, part)
    return losses, module(INPUTS).detach()


def normalised() -> tuple[list[nn.Module], fxfuse.FusionResult]:
    """Two members, and the network that they were fused into."""
    members = [Normalised().eval() for _ in range(2)]
    return members, fxfuse.fuse(members, INPUTS[:4])


@pytest.mark.parametrize("how", ["ddp", "fsdp", "layers"])
@pytest.mark.parametrize("job", ["finetune", "distill", "match"])
def test_training_together_is_training_alone(pair: Processes, job: str, how: str):
    members, result = normalised()
    alone = copy.deepcopy(result.module)
    expected = taught(job, alone, members, slice(None))
    module = result.to_module() if how == "layers" else result.module
    arguments = [[value] * 2 for value in (job, how, module, members)]
    for well, found in pair.run(trained, *arguments):
        assert well, found
        torch.testing.assert_close(found[0], expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(found[1], alone(INPUTS).detach(), atol=1e-4, rtol=0)


def broken(network: nn.Module, kind: str) -> None:
    """A run that cannot go on; runs on each rank."""
    members, part = [copy.deepcopy(network)], slice(dist.get_rank(), None, 2)
    module = wrapped(network, "ddp")
    if kind == "nan":
        inputs = INPUTS[part].clone()
        inputs[0, 0] = float("nan") if dist.get_rank() else 0.0
        finetune(module, [(inputs, LABELS[part])], steps=2, progress=False)
    elif kind == "seconds":
        match(module, members, INPUTS, Match(seconds=1))
    else:
        match(module, members, INPUTS, Match(steps=2, batch=5))


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("nan", RefineError, "became nan"),
        ("seconds", OptionError, "budget in seconds is for one process"),
        ("parts", OptionError, "2 equal parts"),
    ],
)
def test_a_run_that_stops_stops_everywhere(
    pair: Processes, kind: str, error: type[Exception], message: str
):
    _, result = normalised()
    for well, raised in pair.run(broken, [result.module] * 2, [kind] * 2):
        assert not well
        assert isinstance(raised, error), raised
        assert message in str(raised)


def test_a_sampler_is_told_the_pass():
    data = TensorDataset(INPUTS[:8], LABELS[:8])
    sampler = DistributedSampler(data, num_replicas=2, rank=0, seed=3)
    stream = BatchStream(DataLoader(data, batch_size=4, sampler=sampler), 0)
    passes = [stream.next()[0] for _ in range(3)]
    assert not torch.equal(passes[0], passes[1])
    sampler.set_epoch(2)
    assert torch.equal(passes[2], INPUTS[list(sampler)])


def test_without_a_group():
    with pytest.raises(OptionError, match="init_process_group"):
        fxfuse.fuse(Members.on_ranks(resnets(2)), images())
    with pytest.raises(OptionError, match='"world"'):
        fxfuse.fuse(Members.on_ranks(resnets(2), "gloo"), images())
