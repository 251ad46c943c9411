"""Widths by group within a budget, and shares of units by group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fxfuse
from fxfuse import Calibration, Constraints, Refit, Size, Transplant
from fxfuse.activations.calibration import CalibrationBatches
from fxfuse.activations.elimination import errors_by_size
from fxfuse.activations.gradients import importances
from fxfuse.activations.layers import layers_of
from fxfuse.activations.node_runner import NodeRunner
from fxfuse.cli.report.content import sizes_of as costs
from fxfuse.errors import OptionError
from fxfuse.planning.allocation import spread
from fxfuse.transform import cost
from fxfuse.transform.cost import operations_of, parameters_of
from tests.options import flat

FIRST, SECOND = "0.weight:0", "2.weight:0"


def mlp(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    network = nn.Sequential(
        nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)
    )
    with torch.no_grad():
        # Few of the first layer's units matter.
        network[0].weight[3:] *= 0.05
        network[0].bias[3:] *= 0.05
    return network.double()


class Sign(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.argmax(1, keepdim=True)


@pytest.fixture(scope="module")
def members() -> list[fxfuse.Program]:
    return [fxfuse.capture(mlp(seed), torch.randn(4, 5).double()) for seed in range(2)]


def test_units_go_where_an_error_is_cheapest_by_hand():
    # Errors of keeping 1, 2, ... units: the last two of "a" are worth nothing, "c" is convex.
    errors = {"a": np.array([3.0, 1, 0, 0]), "b": np.array([9.0, 5, 2, 0])}

    def cost(sizes: dict[str, int]) -> float:
        return (sizes["a"] + sizes["b"]) / 6

    assert spread(errors, {"a": 3, "b": 3}, {"a": 1, "b": 1}, cost) == {"a": 2, "b": 4}

    def dear(sizes: dict[str, int]) -> float:
        return (sizes["a"] + 4 * sizes["b"]) / 15

    assert spread(errors, {"a": 3, "b": 3}, {"a": 1, "b": 1}, dear) == {"a": 3, "b": 3}
    assert spread(errors, {"a": 2, "b": 2}, {"a": 2, "b": 2}, cost) == {"a": 2, "b": 4}


@pytest.mark.parametrize("seed", range(5))
def test_no_sizes_within_a_budget_are_better_where_errors_are_convex(seed: int):
    generator = np.random.default_rng(seed)
    falls = {name: np.sort(generator.random(n - 1))[::-1] for name, n in (("a", 6), ("b", 9))}
    errors = {name: np.cumsum(fall[::-1])[::-1] for name, fall in falls.items()}
    errors = {name: np.append(each, 0.0) for name, each in errors.items()}

    def cost(sizes: dict[str, int]) -> float:
        return (sizes["a"] + sizes["b"]) / 9

    def error(sizes: dict[str, int]) -> float:
        return sum(each[sizes[name] - 1] for name, each in errors.items())

    found = spread(errors, {"a": 4, "b": 5}, {"a": 1, "b": 1}, cost)
    every = [{"a": a, "b": b} for a in range(1, 7) for b in range(1, 10) if a + b <= 9]
    assert cost(found) <= 1
    assert error(found) == pytest.approx(min(map(error, every)))


def test_how_much_a_layer_counts_by_hand():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 1)).double().eval()
    x = torch.randn(200, 5).double()
    program = fxfuse.capture(network, x[:2])
    batches = CalibrationBatches.of(program, x)
    layers = layers_of(program)
    first, second = importances(NodeRunner(program, program.state(), batches), layers).values()
    with torch.no_grad():
        hidden = network[0](x)
        wanted = (hidden.var(0, correction=0) * network[1].weight[0] ** 2).sum()
        assert first / second == pytest.approx(float(wanted / network(x).var(correction=0)))
    blind = nn.Sequential(*network, Sign()).eval()
    program = fxfuse.capture(blind, x[:2])
    found = importances(NodeRunner(program, program.state(), batches), layers_of(program))
    assert list(found.values()) == [1, 1]


def test_only_a_missing_derivative_is_expected(monkeypatch: pytest.MonkeyPatch):
    class WithoutDerivative(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.special.gammainc(x.abs(), x.abs())

    network = nn.Sequential(nn.Linear(5, 4), WithoutDerivative(), nn.Linear(4, 1)).eval()
    x = torch.randn(20, 5)
    program = fxfuse.capture(network, x[:2])
    runner = NodeRunner(program, program.state(), CalibrationBatches.of(program, x))
    # The last layer is behind it.
    assert list(importances(runner, layers_of(program)).values()) == [1, 1]

    def full(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(torch.autograd, "grad", full)
    with pytest.raises(torch.OutOfMemoryError):
        importances(runner, layers_of(program))


def test_units_that_others_make_up_for_cost_nothing(members: list[fxfuse.Program]):
    graph, x = fxfuse.analyze(members[0]), torch.randn(100, 5).double()
    states = [members[0].state(), members[0].state()]
    batches = CalibrationBatches.of(members[0], x)
    sizes = {group.name: group.n_units for group in graph.groups}
    errors = errors_by_size(graph, states, batches, sizes=sizes)
    for group in graph.groups:
        each = errors[group.name]
        assert len(each) == 2 * group.n_units
        assert each[-1] == 0
        assert (np.diff(each) <= 0).all()
        # The second member is a copy of the first one.
        assert each[group.n_units - 1] < 0.05 * each[0]


def relative(members: list[fxfuse.Program], layer: int) -> torch.Tensor:
    """Score l2 over the group's mean: squares of what writes a unit and of what reads it.

    The output layer holds the 1/N of the mean.
    """
    mean = 1 / len(members) if layer == 2 else 1
    values = torch.cat(
        [
            m.state()[f"{layer}.weight"].square().sum(1)
            + (mean * m.state()[f"{layer + 2}.weight"]).square().sum(0)
            for m in members
        ]
    )
    return values / values.mean()


@pytest.mark.parametrize("width", [0.5, 1.5])
def test_without_inputs_the_score_says_where_units_go(members: list[fxfuse.Program], width: float):
    result = fxfuse.fuse(members, size=Size(width, allocation="auto"))
    even = fxfuse.fuse(members, verify=False, size=width)
    assert parameters_of(result.graph, result.plan.sizes()) <= parameters_of(
        even.graph, even.plan.sizes()
    )
    # Few units of the first layer matter.
    assert result.plan.sizes()[FIRST] < even.plan.sizes()[FIRST]
    assert result.plan.sizes()[SECOND] > even.plan.sizes()[SECOND]
    assert result.plan.options["allocation"] == "auto"


def test_pruning_and_budgets_with_widths_by_group(members: list[fxfuse.Program]):
    pruned = fxfuse.prune(members[0], size=Size(0.25, allocation="auto"))
    assert min(pruned.plan.sizes().values()) >= 1
    assert pruned.plan.options["allocation"] == "auto"
    least = fxfuse.fuse(members, verify=False, size=Size(0.01, allocation="auto"))
    assert set(least.plan.sizes().values()) == {1}
    small = fxfuse.fuse(members, size=Size(max_params=90, multiple_of=2, allocation="auto"))
    assert sum(p.numel() for p in small.module.parameters()) <= 90
    assert all(size % 2 == 0 for size in small.plan.sizes().values())
    again = fxfuse.build(fxfuse.FusionPlan.from_json(small.plan.to_json()), members)
    assert again.plan.sizes() == small.plan.sizes()
    quick = fxfuse.fuse(members, verify=False, size=Size(max_flops=600, allocation="auto"))
    assert operations_of(quick.graph, quick.plan.sizes()) <= 600


class Clock:
    """A clock on which an operation takes 1 µs, and a network 3 µs, a third more and 50 µs."""

    def __init__(self) -> None:
        self.operators = 0

    def __call__(
        self, call: Callable[..., Any], args: Any, kwargs: Any, run_time: float = 0
    ) -> float:
        with FlopCounterMode(display=False) as counter:
            call(*args, **kwargs)
        took = 1e-3 * counter.get_total_flops()
        if isinstance(call, nn.Module):
            return 4 / 3 * took + 0.05
        self.operators += 1
        return took


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(cost, "_timed", found)
    monkeypatch.setattr(cost, "_OPERATORS", {})
    monkeypatch.setattr(cost, "_NETWORKS", WeakKeyDictionary())
    return found


@pytest.mark.parametrize("allocation", ["uniform", "auto"])
@pytest.mark.parametrize("target", [0.6, 2.4])
def test_a_latency_is_met(
    members: list[fxfuse.Program], clock: Clock, target: float, allocation: Any
):
    size = Size(latency=target, allocation=allocation)
    result = fxfuse.fuse(members, verify=False, size=size)
    assert 0.85 * target <= result.latency <= target
    assert result.latency == clock(result.module, *result.graph.program.example_inputs)
    assert costs(result)[-1].milliseconds == result.latency
    assert f"latency {result.latency:.3g} ms" in " ".join(str(result).split())


def test_a_latency_is_met_after_pruning_by_activations(members: list[fxfuse.Program], clock: Clock):
    size = Size(latency=0.6, allocation="auto")
    x = torch.randn(120, 5).double()
    result = fxfuse.prune(members[0], verify=False, size=size, calibration=x, refine=[Refit()])
    assert 0.5 <= result.latency <= 0.6
    assert fxfuse.prune(members[0], verify=False, size=0.5).latency is None


def test_a_latency_is_meant_for_a_batch(members: list[fxfuse.Program], clock: Clock):
    graph = fxfuse.analyze(members[0])
    four, one = (fxfuse.plan(graph, members, size=Size(latency=0.5, batch=b)) for b in (None, 1))
    assert four.sizes()[FIRST] < one.sizes()[FIRST]
    # Operators are timed once for each shape.
    before = clock.operators
    assert fxfuse.plan(graph, members, size=Size(latency=0.5, batch=1)).sizes() == one.sizes()
    assert clock.operators == before


def test_a_latency_on_a_clock_that_goes(
    members: list[fxfuse.Program], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(cost, "_NETWORK_TIME", 0.01)
    result = fxfuse.prune(members[0], verify=False, size=Size(latency=1e4))
    assert 0 < result.latency < 1e4
    assert result.plan.sizes() == {FIRST: 12, SECOND: 8}


@pytest.mark.parametrize(
    ("size", "match"),
    [
        ({"latency": 0}, "latency must be greater than 0, got 0"),
        ({"latency": float("nan")}, "latency must be greater than 0, got nan"),
        ({"latency": 1.0, "width": 0.5}, "width and a budget contradict"),
        ({"latency": 0.01}, "smallest network takes 0.146 ms"),
        ({"latency": 1.0, "batch": 0}, "batch must be at least 1"),
        ({"batch": 2}, "batch needs a latency"),
    ],
)
def test_latencies_that_are_none(
    members: list[fxfuse.Program], clock: Clock, size: dict[str, Any], match: str
):
    with pytest.raises(OptionError, match=match):
        fxfuse.fuse(members, size=Size(**size))


def test_a_price_is_looked_up_over_several_steps():
    errors = {name: np.arange(15.0, -1, -1) ** 2 for name in "ab"}

    def stairs(sizes: dict[str, int]) -> float:
        return (sizes["a"] + 3 * 4 * -(-sizes["b"] // 4)) / 40

    uniform, steps = {"a": 8, "b": 8}, {"a": 1, "b": 1}
    found = [spread(errors, uniform, steps, stairs, reach) for reach in (1, 4)]
    near, far = (sum(errors[name][size - 1] for name, size in each.items()) for each in found)
    assert far < near
    assert stairs(found[1]) <= 1


@pytest.mark.parametrize("likes", ["equal widths", "widths by group"])
def test_widths_by_group_are_taken_only_if_the_judge_prefers_them(
    members: list[fxfuse.Program], likes: str
):
    x = torch.randn(120, 5).double()
    even = fxfuse.prune(members[0], verify=False, size=0.5).plan.sizes()

    def metric(module: nn.Module) -> float:
        equal = module.get_parameter("0.weight").shape[0] == even[FIRST]
        return float(equal == (likes == "equal widths"))

    result = fxfuse.prune(
        members[0],
        size=Size(0.5, allocation="auto"),
        calibration=Calibration(x, evaluate=metric),
        refine=[Refit()],
    )
    assert (result.plan.sizes() == even) == (likes == "equal widths")
    names = ["refitted", "refitted, widths by group"]
    names = names if likes == "equal widths" else names[::-1]
    assert result.history.chosen == names[0]
    other = result.history[names[1]]
    said = {
        "refitted": "left out: refitted, widths by group is closer",
        "refitted, widths by group": "left out: not closer than refitted beyond chance",
    }
    assert other.verdict == said[other.name]
    assert other.chosen_by > result.history[names[0]].chosen_by
    assert sum(p.numel() for p in result.module.parameters()) <= parameters_of(result.graph, even)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"allocation": "auto"}, "allocation='auto' needs a size"),
        ({"allocation": "auto", "width": {"0.*": 0.5}}, "width for each pattern"),
        ({"allocation": "global", "width": 0.5}, "uniform, auto"),
        ({"fraction": {"9.*": 0.5}}, "matches nothing"),
        ({"fraction": {"0.*": 1.5}}, r"fraction must be in \[0, 1\], got 1.5"),
        ({"fraction": {"0.*": 0.5, "*.weight": 0.25}}, "two patterns of fraction contradict"),
    ],
)
def test_bad_input(members: list[fxfuse.Program], options: dict[str, object], match: str):
    with pytest.raises(OptionError, match=match):
        fxfuse.fuse(members, **flat(**options))


def test_a_share_for_a_group_leaves_the_others_to_the_score(members: list[fxfuse.Program]):
    by_score = fxfuse.fuse(members, verify=False).plan
    plan = fxfuse.fuse(
        members, constraints=Constraints(base_member=1), method=Transplant(fraction={"0.*": 0.25})
    ).plan
    assert (plan.map_of(FIRST).member == 0).sum() == 3
    for member in range(2):
        mine = np.sort(plan.map_of(FIRST).of_member(member)[1])
        values = relative(members, 0)[12 * member :][:12]
        best = values.argsort(descending=True)[: len(mine)].sort().values
        assert mine.tolist() == best.tolist()
    for own, wanted in zip(
        (plan.map_of(SECOND).member, plan.map_of(SECOND).unit),
        (by_score.map_of(SECOND).member, by_score.map_of(SECOND).unit),
        strict=True,
    ):
        assert np.array_equal(own, wanted)
    assert plan.options["fraction"] == "{'0.*': 0.25}"
