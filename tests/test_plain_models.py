"""Kinds of networks that no library holds: what is free, at every size, and the oracles on them."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxfuse
from benchmarks.plain_models import NETWORKS, ResNeSt
from fxfuse import Example, verify
from tests.models import excite

#: Groups that have to be found, by the name of a place in them, and how many units they have.
FREE = {
    "gcn": {"layers.0.weight:0": 16, "layers.1.weight:0": 12},
    "gin": {"mlps.0.0.weight:0": 14, "mlps.0.3.weight:0": 10, "mlps.1.3.weight:0": 10},
    "gat": {"project.weight:0": 3},
    "conv-lstm": {"gates.weight:0": 6},
    "mamba": {"embed.weight:0": 8, "conv.weight:0": 12, "log_a:1": 4},
    "rwkv": {"embed.weight:0": 8, "key.weight:0": 8, "key2.weight:0": 16},
    "cbam": {"stem.0.weight:0": 12, "mlp.0.weight:0": 4, "conv.weight:0": 10},
    "resnest": {"stem.weight:0": 6, "conv.weight:0": 12, "squeeze.weight:0": 8},
    "fno": {"lift.weight:0": 8, "project.0.weight:0": 10},
    "fnet": {"mlp.0.weight:0": 20},
    "gfnet": {"patch.weight:0": 10, "mlp.0.weight:0": 18},
    "spectrogram": {"conv.weight:0": 12, "second.weight:0": 10},
    "kan": {"layers.0.spline:0": 10},
    "moe-loop": {"embed.weight:0": 8, "experts.0.0.weight:0": 12},
    "moe-stacked": {"up:0": 3, "up:1": 8, "up:2": 12},
}
#: Those in which no operator mixes members: at width N they are the members' mean.
EXACT = ("gcn", "gat", "conv-lstm", "fno", "spectrogram", "kan")


def _member(name: str, seed: int = 0) -> tuple[nn.Module, Example]:
    build, inputs = NETWORKS[name]
    torch.manual_seed(seed)
    model = build().eval()
    torch.manual_seed(0)
    args = inputs()
    if not any(p.is_complex() for p in model.parameters()):
        model = model.double()
        args = tuple(x.double() if x.is_floating_point() else x for x in args)
    torch.manual_seed(seed)
    return excite(model, args), Example(args)


@lru_cache
def _program(name: str, seed: int = 0) -> fxfuse.Program:
    return fxfuse.capture(*_member(name, seed))


@lru_cache
def _graph(name: str) -> fxfuse.CouplingGraph:
    return fxfuse.analyze(_program(name))


@pytest.mark.parametrize("name", NETWORKS)
def test_units_may_be_permuted_and_pruned(name: str):
    model, example = _member(name)
    program, graph = _program(name), _graph(name)
    check = verify.permutation_of(graph)
    assert check.passed, check
    assert verify.sensitivity(program) > 1e-3
    assert not graph.without_rule
    for place, units in FREE.get(name, {}).items():
        tensor, dim = place.rsplit(":", 1)
        assert [g.n_units for g in graph.group_of[(tensor, int(dim))]] == [units], place
    pruned = fxfuse.prune(program, size=0.5).module
    assert _weights(pruned) < 0.8 * _weights(model)
    assert pruned(*example.args).isfinite().all()


@pytest.mark.parametrize("name", EXACT)
def test_members_side_by_side_are_their_mean(name: str):
    check = verify.concatenation_equals_ensemble([_program(name, seed) for seed in (0, 1)])
    assert check.tolerance < 1
    assert check.passed, check


def test_a_basis_means_the_same_in_all_members():
    graph = _graph("kan")
    assert "order matters" in graph.frozen[("layers.1.grid", 1)].why
    for place in (("layers.1.grid", 1), ("layers.1.spline", 2)):
        assert graph.frozen[place].kind == "shared"


class Differences(nn.Module):
    """Neighbouring neurons are compared, so all of them are one unit."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 8), nn.Linear(7, 5), nn.Linear(5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        return self.last(self.second(y[:, 1:] - y[:, :-1]).tanh())


def test_a_single_unit_is_not_free_and_says_why():
    graph = fxfuse.analyze(Differences(), torch.randn(2, 4))
    assert graph.single_units.keys() == {"first.weight:0"}
    assert "aten.sub" in graph.single_units["first.weight:0"]
    first = _weights(graph.program.source.first)
    last = graph.program.source.last.bias.numel()
    assert graph.free_fraction == 1 - (first + last) / _weights(graph.program.source)


class ZeroKeyBias(nn.Module):
    """Attention whose keys have a bias that stays zero (BEiT, Swin v2)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(12, 3)
        self.weight = nn.Parameter(torch.randn(36, 8))
        self.q, self.v = nn.Parameter(torch.randn(12)), nn.Parameter(torch.randn(12))
        self.register_buffer("k", torch.zeros(12), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.linear(self.first(x), self.weight, torch.cat((self.q, self.k, self.v)))
        q, k, v = x.unflatten(-1, (3, 4, 3)).permute(2, 0, 3, 1, 4)
        return self.last(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_a_constant_among_weights_constrains_only_its_piece():
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    members = [ZeroKeyBias().double() for _ in range(2)]
    graph = fxfuse.analyze(members[0], x)
    assert [g.n_units for g in graph.group_of[("q", 0)]] == [4]
    assert verify.permutation_of(graph).passed
    check = verify.concatenation_equals_ensemble(members, x)
    assert check.tolerance < 1
    assert check.passed, check
    assert _weights(fxfuse.prune(members[0], x, size=0.5).module) < 0.6 * _weights(members[0])


@pytest.mark.parametrize("groups", [1, 2])
def test_channels_of_split_attention(groups: int):
    """One cardinal group: the channels are units; several: the groups are."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    graph = fxfuse.analyze(excite(ResNeSt(groups=groups).double(), x), x)
    assert [g.n_units for g in graph.group_of[("conv.weight", 0)]] == [12 if groups == 1 else 2]
    assert verify.permutation_of(graph).passed


@pytest.mark.parametrize("name", ["ddpm-unet", "adm-unet"])
def test_channels_of_a_norm_whose_groups_are_but_one(name: str):
    graph = _graph(name)
    assert not graph.single_units
    # Those of the norm's two groups are never exchanged.
    assert [g.n_units for g in graph.group_of[("stem.weight", 0)]] == [4, 4]


def _weights(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
