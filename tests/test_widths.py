"""Any width: the resized network is the concatenation whose other units are dead."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fxfuse
from fxfuse import Size
from fxfuse.analysis.coupling import CouplingGraph
from fxfuse.errors import OptionError, RewriteError
from fxfuse.graph.tensors import tensors_in
from fxfuse.planning.plan import FusionPlan, UnitMap
from fxfuse.planning.size import sizes_of
from fxfuse.transform.cost import operations_of, parameters_of
from fxfuse.transform.layout import Layout
from fxfuse.transform.resizing import emit_resized, limit_sizes
from fxfuse.transform.resizing.positions import layouts_of, positions_of
from fxfuse.verify.check import as_double, in_double, inputs_of, relative_error
from tests.models import build, image
from tests.options import flat, planned
from tests.strategies import Recipe, is_plain, members_of, recipes


def plans(
    graph: CouplingGraph, states: list[Mapping[str, torch.Tensor]], sizes: Mapping[str, int]
) -> tuple[FusionPlan, FusionPlan]:
    """Randomly chosen units in the given sizes; and all units, those not chosen dead."""
    generator = np.random.default_rng(0)
    whole = planned(graph, states, "concatenate")
    chosen, masked = [], []
    for m in whole.maps:
        keep = np.sort(generator.permutation(m.n_units)[: sizes[m.group]])
        target = np.arange(len(keep))
        chosen.append(UnitMap(m.group, len(keep), target, m.member[keep], m.unit[keep]))
        alive = np.isin(np.arange(m.n_units), keep).astype(float)
        masked.append(replace(m, weight=alive, read=alive))
    return replace(whole, maps=tuple(chosen)), replace(whole, maps=tuple(masked))


def error_at(members: list[nn.Module], width: float) -> tuple[float, dict[str, str]]:
    """Relative error against the masked concatenation, float64; and the groups that refused."""
    program = [m if isinstance(m, fxfuse.Program) else None for m in members]
    assert all(c is not None for c in program)
    graph = fxfuse.analyze(members[0])
    wanted = sizes_of(graph, len(members), width, at_least_one=True)
    sizes, refused = limit_sizes(graph, wanted)
    states = [as_double(c.state()) for c in program if c is not None]
    small, masked = plans(graph, states, sizes)
    args, kwargs = inputs_of(graph.program)
    with torch.no_grad():
        found, expected = (
            tensors_in(in_double(emit_resized(graph, plan, states))(*args, **kwargs))
            for plan in (small, masked)
        )
    return relative_error(found, expected), refused


@pytest.mark.parametrize("width", [0.5, 1.5])
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5"])
def test_architectures(name: str, width: float) -> None:
    members = [fxfuse.capture(build(name, seed), (image(),)) for seed in range(2)]
    error, refused = error_at(members, width)
    assert error < 1e-9
    assert not refused


@settings(suppress_health_check=list(HealthCheck), deadline=None, max_examples=15)
@given(recipes(), st.sampled_from([0.3, 0.5, 0.75, 1.25, 1.5]))
def test_random_networks(recipe: Recipe, width: float) -> None:
    members = members_of(recipe, 2)
    error, _ = error_at(members, width)
    if is_plain(recipe):
        assert error < 1e-9


class Positions(nn.Module):
    """Heads that pick positions, by an index that all of them share."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 15)
        self.last = nn.Linear(6, 2)

    def forward(self, x: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        heads = self.first(x).unflatten(-1, (3, 5)).relu()
        picked = heads.gather(-1, chosen.unsqueeze(1).expand(-1, 3, -1))
        return self.last(picked.flatten(1))


@pytest.mark.parametrize("width", [1 / 3, 2 / 3, 4 / 3, 2])
def test_an_index_grows_with_what_it_picks_from(width: float) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(3, 4).double(), torch.randint(5, (3, 2))
    members = [fxfuse.capture(Positions().double(), inputs) for _ in range(2)]
    error, refused = error_at(members, width)
    assert error < 1e-9
    assert not refused


class Masked(nn.Module):
    """Heads with one mask for each of them, all equal."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 12)
        self.last = nn.Linear(12, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = self.first(x).unflatten(-1, (3, 4)).transpose(1, 2)
        mask = x.new_zeros(1, 3, x.shape[1], x.shape[1])
        mask = mask.masked_fill(x.sum(-1)[:, None, None, :] > 0.5, -1.0)
        y = nn.functional.scaled_dot_product_attention(heads, heads, heads, mask)
        return self.last(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("width", [1 / 3, 2 / 3, 4 / 3, 2])
def test_a_mask_that_is_the_same_for_all_heads_fits_any_number_of_them(width: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 4).double()
    members = [fxfuse.capture(Masked().double(), (x,)) for _ in range(2)]
    error, refused = error_at(members, width)
    assert error < 1e-9
    assert not refused


class Net(nn.Module):
    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)
        self.second = nn.Conv2d(channels, 2 * channels, 3, padding=1)
        self.head = nn.Linear(2 * channels * 4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.second(self.norm(self.first(x)).relu()).relu()
        return self.head(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1))


@pytest.fixture
def members() -> list[nn.Module]:
    torch.manual_seed(0)
    return [Net().eval() for _ in range(3)]


X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_all_units_are_the_mean(members: list[nn.Module]) -> None:
    result = fxfuse.fuse(members, X, size=3)
    with torch.no_grad():
        mean = torch.stack([m(X) for m in members]).mean(0)
        torch.testing.assert_close(result.module(X), mean, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(result.module(X), result.module(X + 1))


def test_a_members_width_is_what_it_was(members: list[nn.Module]) -> None:
    first, second = fxfuse.fuse(members, X), fxfuse.fuse(members, X, size=1)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name


def test_rows_and_columns_by_hand(members: list[nn.Module]) -> None:
    result = fxfuse.fuse(members, X, size=0.5)
    units = result.plan.map_of("first.weight:0")
    rows = [members[m].first.weight[u] for m, u in zip(units.member, units.unit, strict=True)]
    assert torch.equal(result.module.first.weight, torch.stack(rows))
    owners = result.plan.map_of("second.weight:0")
    for place, (member, unit) in enumerate(zip(owners.member, owners.unit, strict=True)):
        row = members[member].second.weight[unit]
        for column, (source, k) in enumerate(zip(units.member, units.unit, strict=True)):
            expected = row[k] if source == member else torch.zeros_like(row[k])
            assert torch.equal(result.module.second.weight[place, column], expected)


@pytest.mark.parametrize("width", [0.5, 1.5, 3])
def test_what_comes_out_is_a_module(members: list[nn.Module], width: float) -> None:
    module = fxfuse.fuse(members, X, size=width).module
    again = pickle.loads(pickle.dumps(module))
    exported = torch.export.export(copy.deepcopy(module), (X,)).module()
    with torch.no_grad():
        expected = module(X)
        torch.testing.assert_close(again(X), expected)
        torch.testing.assert_close(exported(X), expected)
    module.train()
    module(X).sum().backward()
    assert all(p.grad is not None for p in module.parameters())


def test_a_plan_survives_json(members: list[nn.Module]) -> None:
    plan = fxfuse.fuse(members, X, size=1.5).plan
    assert fxfuse.FusionPlan.from_json(plan.to_json()).to_json() == plan.to_json()


def test_width_by_pattern(members: list[nn.Module]) -> None:
    module = fxfuse.fuse(members, X, size={"first.*": 0.5}).module
    assert module.first.weight.shape == (4, 3, 3, 3)
    assert module.second.weight.shape == (16, 4, 3, 3)


def test_channels_are_rounded(members: list[nn.Module]) -> None:
    module = fxfuse.fuse(members, X, size=Size(0.7, multiple_of=4)).module
    assert module.first.weight.shape[0] % 4 == module.second.weight.shape[0] % 4 == 0


def test_budgets_are_met(members: list[nn.Module]) -> None:
    graph = fxfuse.analyze(fxfuse.capture(members[0], X))
    sizes = {g.name: g.n_units for g in graph.groups}
    params, flops = parameters_of(graph, sizes), operations_of(graph, sizes)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        members[0](X)
    assert flops == counter.get_total_flops()
    assert params == sum(p.numel() for p in members[0].parameters())
    result = fxfuse.fuse(members, X, size=Size(max_params=params // 2))
    used = sum(p.numel() for p in result.module.parameters())
    assert used == parameters_of(graph, result.plan.sizes())
    assert 0.3 * params < used <= params // 2
    by_flops = fxfuse.fuse(members, X, size=Size(max_flops=2 * flops)).module
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        by_flops(X)
    assert 1.5 * flops < counter.get_total_flops() <= 2 * flops


@pytest.mark.parametrize("width", [0, -1, 3.01, float("nan"), float("inf"), 0.01])
def test_widths_that_no_network_has(members: list[nn.Module], width: float) -> None:
    message = "width 0.01 leaves no unit" if width == 0.01 else r"width must be in \(0, 3\], got"
    with pytest.raises(OptionError, match=message):
        fxfuse.fuse(members, X, size=width)


def test_a_budget_that_cannot_be_met_says_the_smallest(members: list[nn.Module]) -> None:
    with pytest.raises(OptionError, match=r"smallest network has [0-9,]+ parameters"):
        fxfuse.fuse(members, X, size=Size(max_params=10))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"width": {"frist.*": 0.5}}, "matches nothing"),
        ({"width": {"first.*": 0.5, "first.weight": 1.5}}, "two patterns of width contradict"),
        ({"width": 0.5, "max_params": 1000}, "width and a budget contradict"),
        ({"width": 0.5, "method": "average"}, "member's width only"),
        ({"width": 0.5, "multiple_of": 0}, "multiple_of must be at least 1, got 0"),
    ],
)
def test_bad_options(members: list[nn.Module], options: dict[str, object], match: str) -> None:
    with pytest.raises(OptionError, match=match):
        fxfuse.fuse(members, X, **flat(**options))  # type: ignore[arg-type]


def test_a_group_that_cannot_be_written_keeps_its_size(
    members: list[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fxfuse.transform.resizing import walk

    honest = walk._step

    def refusing(wide: walk.ResizedGraph, node: torch.fx.Node) -> None:
        honest(wide, node)
        if node.name == "batch_norm" and wide.layout_of(node):
            raise RewriteError("not written", where=node.name, why="this is a test")

    monkeypatch.setattr(walk, "_step", refusing)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = fxfuse.fuse(members, X, size=0.5)
    assert result.module.first.weight.shape[0] == 8
    assert result.module.second.weight.shape[0] == 8
    assert list(result.plan.kept_sizes) == ["first.weight:0"]
    assert "this is a test" in result.plan.summary()


class Modulated(nn.Module):
    """A convolution whose weight depends on the example: one group for each of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.style = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 8)
        self.weight = nn.Parameter(0.2 * torch.randn(1, 8, 8, 3, 3))
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.stem(x).relu()
        b, c, *size = h.shape
        style = self.style(h.mean((2, 3))) + 1
        weight = (self.weight * style[:, None, :, None, None]).reshape(b * c, c, 3, 3)
        y = nn.functional.conv2d(h.reshape(1, b * c, *size), weight, padding=1, groups=b)
        return self.head(y.reshape(b, c, *size).relu().mean((2, 3)))


@pytest.mark.parametrize("size", [0.5, 1.5])
def test_groups_that_are_as_many_as_the_batch(size: float):
    torch.manual_seed(0)
    members, x = [Modulated().eval() for _ in range(2)], torch.randn(4, 3, 6, 6)
    result = fxfuse.fuse(members, x, size=size)
    assert result.module.stem.weight.shape[0] == 8 * size
    more = torch.randn(5, 3, 6, 6)
    torch.testing.assert_close(result.to_module()(more), result.module(more))
    assert fxfuse.verify.concatenation_equals_ensemble(members, x).passed


def test_positions_of_many_growing_dimensions():
    shape = (2,) * 6
    value: Any = SimpleNamespace(shape=shape, rank=6)
    twice = Layout(np.array([0, 1, 0, 1]), np.array([0, 0, 1, 1]))
    place, copy = positions_of(value, dict.fromkeys(range(6), twice))
    found = layouts_of(torch.arange(64).reshape(shape), place, copy, set(range(6)))
    assert found is not None
    assert all(np.array_equal(found[d].copy, twice.copy) for d in range(6))
    value = SimpleNamespace(shape=(2,) * 7, rank=7)
    with pytest.raises(RewriteError, match="7 of its dimensions grow"):
        positions_of(value, dict.fromkeys(range(7), twice))


class NothingBehindPositions(nn.Module):
    """Attention whose positions take a part of each head, here all of it: an empty part is left."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.head = nn.Linear(5, 24), nn.Linear(12, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, v = self.qkv(x).unflatten(-1, (4, 6)).split(3, -1)
        q = torch.cat([q[..., :3].roll(1, -1), q[..., 3:]], -1).transpose(1, 2)
        y = nn.functional.scaled_dot_product_attention(q, q, v.transpose(1, 2))
        return self.head(y.transpose(1, 2).flatten(2))


class OneForAllHeads(nn.Module):
    """All heads of queries read one head of keys, of states, and of values (multi-query)."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.head = nn.Linear(5, 12), nn.Linear(5, 6), nn.Linear(12, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.q(x).unflatten(-1, (4, 3)).transpose(1, 2)
        k, v = (t.unsqueeze(1).expand(-1, 4, -1, -1) for t in self.kv(x).chunk(2, -1))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        y = y + torch.einsum("bhts,bhsd->bhtd", torch.einsum("bhtd,bhsd->bhts", q, k), v)
        y = y + (q @ k.transpose(-1, -2)).tanh() @ v
        return self.head(y.transpose(1, 2).flatten(2))


class Registers(nn.Module):
    """Attention over the inputs and tokens that are learned, under a mask that hides nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Parameter(torch.randn(4, 5)), nn.Linear(12, 2)
        self.q = nn.Linear(5, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.cat([x, self.tokens.expand(x.shape[0], -1, -1)], 1)
        q = self.q(x).unflatten(-1, (4, 3)).transpose(1, 2)
        mask = (torch.arange(x.shape[1])[:, None] >= 0).expand(x.shape[0], 1, -1, x.shape[1])
        y = nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask)
        return self.head(y.transpose(1, 2).flatten(2)[:, :4])


@pytest.mark.parametrize("size", [0.5, 1.5])
@pytest.mark.parametrize("network", [NothingBehindPositions, OneForAllHeads, Registers])
def test_heads_that_not_all_have_their_own(network: type[nn.Module], size: float):
    x = torch.randn(2, 4, 5)
    members = [network() for _ in range(2)]
    result = fxfuse.fuse(members, x, size=size)
    assert result.module(x).isfinite().all()
    assert result.module.head.weight.shape[1] == 12 * size
    assert fxfuse.verify.concatenation_equals_ensemble(members, x).passed


class ClassToken(nn.Module):
    """A token that is learned, repeated for every input of a batch of any size."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.stem, self.head = (
            nn.Parameter(torch.randn(1, 1, 12)),
            nn.Linear(5, 12),
            nn.Linear(12, 2),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), self.stem(x)], 1)
        return self.head(x.relu().sum(1))


@pytest.mark.parametrize("units", [9, 13, 15, 17])
def test_a_batch_does_not_grow_with_the_units(units: int):
    """A batch of 2 times 15/12 is not whole, and rounded it would be the batch itself."""
    members, x = [ClassToken() for _ in range(2)], torch.randn(7, 4, 5)
    result = fxfuse.fuse(members, x[:2], size=units / 12)
    whole = result.module(x)
    torch.testing.assert_close(whole[3:], result.module(x[3:]))


class LikeUnits(nn.Module):
    """Zeros in the shape of units become a state of another shape, which meets other units."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(5, 12), nn.Linear(5, 12), nn.Linear(12, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = torch.zeros_like(self.first(x).unflatten(-1, (4, 3))).flatten(-2)
        return self.head(self.second(x).relu() + state)


class Streams(nn.Module):
    """Copies of one stream, mixed by matrices of which each is one unit."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(5, 6), nn.Linear(6, 2)
        self.mix = nn.ModuleList(nn.Linear(6, 16) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.stem(x).relu().unsqueeze(-2).expand(-1, -1, 4, -1)
        for mix in self.mix:
            h = self.mixed(mix(h.mean(-2)).unflatten(-1, (4, 4)).softmax(-1), h)
        return self.head(h.mean(-2))

    def mixed(self, weights: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        return weights.transpose(-1, -2) @ h


class SpelledStreams(Streams):
    def mixed(self, weights: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        return torch.einsum("btij,btid->btjd", weights, h)


class SymmetricStreams(Streams):
    def mixed(self, weights: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        return (weights + weights.transpose(-1, -2)) @ h


class BalancedStreams(Streams):
    def mixed(self, weights: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        return (weights / weights.sum(-2, keepdim=True)).transpose(-1, -2) @ h


@pytest.mark.parametrize("size", [0.5, 1.5])
def test_zeros_in_the_shape_of_units_fit_other_units(size: float):
    members, x = [LikeUnits() for _ in range(2)], torch.randn(2, 4, 5)
    result = fxfuse.fuse(members, x, size=size)
    assert result.module(x).isfinite().all()
    assert result.module.head.weight.shape[1] == 12 * size


@pytest.mark.parametrize("size", [0.5, 1.5, 2])
@pytest.mark.parametrize("network", [Streams, SpelledStreams, SymmetricStreams, BalancedStreams])
def test_a_matrix_that_is_one_unit_grows_in_both_dimensions_or_in_none(
    network: type[Streams], size: float
):
    members, x = [network() for _ in range(2)], torch.randn(2, 4, 5)
    # At two members' size, all units of both are their mean: the oracle asks.
    result = fxfuse.fuse(members, x, size=size)
    assert result.module(x).isfinite().all()
    rows = result.module.get_parameter("mix.0.weight").shape[0]
    assert rows == (32 if size == 2 else 16)


class Experts(nn.Module):
    """Attention, then tokens go to two experts: the data say how many to each."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.route = nn.Linear(5, 12), nn.Linear(12, 2)
        self.experts = nn.ModuleList(nn.Linear(12, 12) for _ in range(2))
        self.head = nn.Linear(12, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.q(x).unflatten(-1, (4, 3)).transpose(1, 2)
        y = nn.functional.scaled_dot_product_attention(q, q, q).transpose(1, 2)
        y = y.view(x.shape[0], x.shape[1], 12).flatten(0, 1)
        chosen = self.route(y).argmax(-1)
        order, sizes = chosen.sort()[1], nn.functional.one_hot(chosen, 2).sum(0).tolist()
        parts = y[order].split(sizes)
        found = torch.cat([e(part).tanh() for e, part in zip(self.experts, parts, strict=True)])
        y = torch.zeros_like(y).index_add_(0, order, found) + y
        return self.head(y.unflatten(0, x.shape[:2]))


def test_tokens_go_to_experts_as_the_data_say():
    x = torch.randn(3, 4, 5)
    members = [Experts().eval() for _ in range(2)]
    assert fxfuse.verify.permutation(members[0], x).passed
    result = fxfuse.fuse(members, x, size=1.5)
    assert result.emitted
    assert result.module.get_parameter("experts.0.weight").shape == (18, 18)
    own = torch.stack([member(x) for member in members]).mean(0)
    torch.testing.assert_close(fxfuse.stack(members, x)(x), own)
