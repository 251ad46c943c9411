"""Kinds of networks that no library holds: what is free, at every size, and the oracles on them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxfuse
from benchmarks.plain_models import NETWORKS
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
    "fno": {"lift.weight:0": 8, "project.0.weight:0": 10},
    "fnet": {"mlp.0.weight:0": 20},
    "gfnet": {"patch.weight:0": 10, "mlp.0.weight:0": 18},
    "spectrogram": {"conv.weight:0": 12, "second.weight:0": 10},
    "kan": {"layers.0.spline:0": 10},
    "moe-loop": {"embed.weight:0": 8, "experts.0.0.weight:0": 12},
    "moe-stacked": {"up:0": 3, "up:1": 8, "up:2": 12},
}
#: Half of the units cannot be written, and why.
ONE_SIZE = {
    "condconv": "the number of a convolution's groups depends on the batch",
    "stylegan2": "the number of a convolution's groups depends on the batch",
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


@pytest.mark.parametrize("name", NETWORKS)
def test_units_may_be_permuted_and_pruned(name: str):
    model, example = _member(name)
    program = fxfuse.capture(model, example)
    graph = fxfuse.analyze(program)
    check = verify.permutation_of(graph)
    assert check.passed, check
    assert verify.sensitivity(program) > 1e-3
    assert not graph.without_rule
    for place, units in FREE.get(name, {}).items():
        tensor, dim = place.rsplit(":", 1)
        assert [g.n_units for g in graph.group_of[(tensor, int(dim))]] == [units], place
    if name not in ONE_SIZE:
        pruned = fxfuse.prune(program, size=0.5).module
        assert _weights(pruned) < 0.8 * _weights(model)
        assert pruned(*example.args).isfinite().all()


@pytest.mark.parametrize("name", EXACT)
def test_members_side_by_side_are_their_mean(name: str):
    check = verify.concatenation_equals_ensemble(
        [fxfuse.capture(*_member(name, seed)) for seed in (0, 1)]
    )
    assert check.tolerance < 1
    assert check.passed, check


def test_a_basis_means_the_same_in_all_members():
    graph = fxfuse.analyze(*_member("kan"))
    assert "order matters" in graph.frozen[("layers.1.grid", 1)].why
    for place in (("layers.1.grid", 1), ("layers.1.spline", 2)):
        assert graph.frozen[place].kind == "shared"


def test_a_single_unit_is_not_free_and_says_why():
    graph = fxfuse.analyze(*_member("ddpm-unet"))
    (name,) = graph.single_units
    assert "aten.group_norm" in graph.single_units[name]
    group = next(g for g in graph.groups if g.name == name)
    alone = {n for n, _ in group.index} - {
        n for g in graph.groups if g.n_units > 1 for n, _ in g.index
    }
    weights = dict(graph.program.module.named_parameters())
    lost = sum(weights[n].numel() for n in alone if n in weights)
    assert graph.free_fraction <= 1 - lost / sum(p.numel() for p in weights.values())


def _weights(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
