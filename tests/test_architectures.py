"""The oracles on every architecture that the project promises."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import nn

import fxfuse
from fxfuse import verify
from tests.models import LARGE, PLAIN, build, excite, image
from tests.nets import programs

#: The large ones run with `pytest -m nightly`.
NETWORKS = [pytest.param(n, marks=pytest.mark.nightly) if n in LARGE else n for n in PLAIN]


@pytest.mark.parametrize("name", NETWORKS)
def test_permutation_and_wide(name: str):
    members = programs((slim(build(name, seed)) for seed in range(2)), image())
    check_permutation(members[0])
    check = verify.concatenation_equals_ensemble(members)
    assert check.passed, check
    assert check.tolerance == verify.EXACT, check.detail


@pytest.mark.parametrize("name", [pytest.param("vit_b_32", marks=pytest.mark.nightly), "swin_t"])
def test_permutation_and_what_mixes(name: str):
    members = programs((build(name, seed) for seed in range(2)), image())
    check_permutation(members[0])
    check = verify.concatenation_equals_ensemble(members)
    assert check.tolerance == float("inf")
    assert "normalisation over the members' neurons (layer_norm)" in check.detail
    assert check.error > 1e-6


def test_permutation_of_attention():
    check_permutation(fxfuse.capture(build("vit_b_32"), image()))


def check_permutation(program: fxfuse.Program) -> None:
    graph = fxfuse.analyze(program)
    check = verify.permutation_of(graph)
    assert check.passed, check
    assert check.tolerance == verify.EXACT
    # Not blind: the input reaches the output, and nearly every weight was moved.
    assert verify.sensitivity(program) > 1e-3
    assert graph.free_fraction > 0.99


def slim(model: nn.Module) -> nn.Module:
    """Narrows a VGG's or AlexNet's hidden classifier: 4096 wide, two of them take 20 GB in fp64."""
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    if not any(isinstance(m, nn.Linear) and m.out_features == 4096 for m in layers):
        return model
    for layer, rows, columns in zip(layers, (32, 32, None), (None, 32, 32), strict=True):
        layer.weight = nn.Parameter(layer.weight[:rows, :columns].detach().clone())
        layer.bias = nn.Parameter(layer.bias[:rows].detach().clone())
    return model


class Perceptron(nn.Module):
    """An MLP with one kind of normalisation, dropout and a residual connection."""

    def __init__(self, norm: type[nn.Module]) -> None:
        super().__init__()
        self.first = nn.Linear(12, 24)
        self.norm = norm(24)
        self.drop = nn.Dropout(0.5)
        self.second = nn.Linear(24, 24)
        self.head = nn.Linear(24, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.drop(self.norm(self.first(x)).relu())
        return self.head((x + self.second(x)).tanh())


@pytest.mark.parametrize("norm", [nn.Identity, nn.BatchNorm1d, nn.LayerNorm])
def test_perceptron(norm: type[nn.Module]):
    x = torch.randn(6, 12, dtype=torch.float64)
    members = [excite(Perceptron(norm).double(), x) for _ in range(3)]
    assert verify.permutation(members[0], x).passed
    wide = verify.concatenation_equals_ensemble(members, x)
    assert wide.passed, wide
    assert (wide.tolerance == verify.EXACT) == (norm is not nn.LayerNorm)
    graph = fxfuse.analyze(members[0], x)
    assert [g.n_units for g in graph.groups] == [24]
    assert graph.free_fraction > 0.99


@pytest.mark.parametrize(("score", "n"), [("l1", 2), ("l2", 4)])
@pytest.mark.parametrize("name", ["vgg11_bn", "resnet18"])
def test_parity_with_torch_pruning(name: str, n: int, score: str):
    members = [slim(build(name, seed, torch.float32)) for seed in range(n)]
    check = verify.parity(members, image(dtype=torch.float32), score=score)
    assert check.passed, check


@pytest.mark.parametrize("n", [2, 4])
def test_parity_with_torch_pruning_on_an_mlp(n: int):
    x = torch.randn(4, 12)
    members = [
        nn.Sequential(nn.Linear(12, 40), nn.ReLU(), nn.Linear(40, 24), nn.ReLU(), nn.Linear(24, 5))
        for _ in range(n)
    ]
    check = verify.parity(members, x)
    assert check.passed, check


def test_parity_notices_another_selection(monkeypatch: pytest.MonkeyPatch):
    module = importlib.import_module("fxfuse.verify.parity")
    monkeypatch.setattr(module, "degree_of", lambda score: 1)
    members = [build("resnet18", seed, torch.float32) for seed in range(2)]
    assert not verify.parity(members, image(dtype=torch.float32), score="l2").passed


@pytest.mark.parametrize("name", ["alexnet", "resnet18", "densenet121", "shufflenet_v2_x0_5"])
def test_fusing_a_network_with_its_permuted_copy_gives_it_back(name: str):
    check = verify.identity(slim(build(name)), image())
    assert check.passed, check
    assert check.tolerance == verify.EXACT
