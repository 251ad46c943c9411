"""The oracles themselves: they can fail, and they say what they cannot judge."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch
from torch import nn

import fxfuse
from fxfuse import verify
from fxfuse.errors import RewriteError
from fxfuse.transform.apply import random_permutations
from tests.nets import images, resnets
from tests.options import planned


class Chaos(nn.Module):
    """Amplifies rounding by several orders of magnitude."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = (40 * layer(x)).sin()
        return x


def test_an_ill_conditioned_network_is_judged_by_its_own_rounding():
    x = torch.randn(4, 16, dtype=torch.float64)
    check = verify.permutation(Chaos(6).double(), x)
    assert check.passed, check
    assert check.tolerance > verify.EXACT
    assert "ill-conditioned" in check.detail


def test_a_network_of_pure_noise_is_not_judged():
    x = torch.randn(4, 16, dtype=torch.float64)
    check = verify.permutation(Chaos(12).double(), x)
    assert not check.passed
    assert check.tolerance <= 1e-4


def test_a_blind_network_is_told():
    class Blind(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 8)
            self.last = nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.first(x * 0).relu())

    check = verify.permutation(Blind(), torch.randn(3, 4))
    assert "two inputs differ by 0.0e+00" in check.detail


def test_the_wide_oracle_notices_a_wrong_weight(monkeypatch: pytest.MonkeyPatch):
    module = importlib.import_module("fxfuse.verify.wide")
    honest = module.emit_resized

    def sabotaged(*args: object) -> nn.Module:
        wide = honest(*args)
        with torch.no_grad():
            wide.get_parameter("block1.conv1.weight")[0, 0] += 0.1
        return wide

    members = resnets(3, torch.float64)
    x = images(dtype=torch.float64)
    assert verify.concatenation_equals_ensemble(members, x).passed
    monkeypatch.setattr(module, "emit_resized", sabotaged)
    assert not verify.concatenation_equals_ensemble(members, x).passed


def test_the_wide_network_is_three_times_as_wide():
    from fxfuse.transform.resizing import emit_resized

    members = resnets(3)
    x = images()
    program = [fxfuse.capture(m, x) for m in members]
    graph = fxfuse.analyze(program[0])
    states = [c.state() for c in program]
    wide = emit_resized(graph, planned(graph, states, "concatenate"), states)
    assert wide.get_parameter("block1.conv1.weight").shape == (24, 24, 3, 3)
    assert wide.get_parameter("fc.weight").shape == (4, 24)
    mean = torch.stack([m(x) for m in members]).mean(0)
    torch.testing.assert_close(wide(x), mean)


class Written(nn.Module):
    """Writes neurons into a part of another tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.last = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.new_zeros(x.shape[0], 8)
        wide[:, 1:7] = self.first(x).relu()
        return self.last(wide)


def test_a_part_that_is_written_to_is_concatenated():
    x = torch.randn(3, 4)
    assert verify.permutation(Written(), x).passed
    wide = verify.concatenation_equals_ensemble([Written(), Written()], x)
    assert (wide.passed, wide.tolerance) == (True, verify.EXACT)


class BesideZeros(nn.Module):
    """A token without neurons in front of labelled ones."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.last = nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x).relu().unsqueeze(1)
        return self.last(torch.cat([y.new_zeros(y.shape[0], 1, 6), y], 1)).sum(1)


def test_zeros_are_joined_to_neurons():
    x = torch.randn(3, 4)
    assert verify.permutation(BesideZeros(), x).passed
    wide = verify.concatenation_equals_ensemble([BesideZeros(), BesideZeros()], x)
    assert (wide.passed, wide.tolerance) == (True, verify.EXACT)


class Cropped(nn.Module):
    """Negative padding."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.last = nn.Linear(5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(nn.functional.pad(self.first(x).relu(), (-1, 0)))


def test_what_cannot_be_concatenated_is_an_error_that_names_the_node():
    x = torch.randn(3, 4)
    assert verify.permutation(Cropped(), x).passed
    with pytest.raises(RewriteError, match="the concatenated network cannot be written") as caught:
        verify.concatenation_equals_ensemble([Cropped(), Cropped()], x)
    assert "(-1, 0)" in caught.value.where


def test_every_group_is_really_permuted():
    pair = fxfuse.CouplingGroup("pair", 2, {})
    single = fxfuse.CouplingGroup("single", 1, {})
    for seed in range(20):
        moves = random_permutations((pair, single), np.random.default_rng(seed))
        assert moves["pair"].tolist() == [1, 0]
        assert moves["single"].tolist() == [0]


def test_relative_error_of_nan_is_infinite():
    nan = torch.tensor([float("nan")])
    assert verify.relative_error([nan], [torch.ones(1)]) == float("inf")
    assert verify.relative_error([torch.tensor([2.5])], [torch.tensor([2.0])]) == 0.25


class MadeInside(nn.Module):
    """Neurons are summed by a matrix that the network makes, and that names no precision."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).relu()
        return self.last(x) + nn.functional.linear(x, 0.1 * torch.ones(3, 8))


def test_a_tensor_that_is_made_inside_is_in_double_and_of_any_size():
    x = torch.randn(5, 4)
    members = [MadeInside().eval() for _ in range(2)]
    check = verify.permutation(members[0], x)
    assert check.passed
    assert check.error < verify.EXACT
    assert "own precision" not in check.detail
    result = fxfuse.fuse(members, x, size=1.5)
    assert result.module.first.weight.shape[0] == 12
    assert fxfuse.stack(members, x)(x).shape == (5, 3)


@pytest.mark.parametrize(("step", "padding", "gap"), [(1, 0, 1), (2, 3, 2), (3, 1, 4)])
def test_a_convolution_of_a_long_sequence_is_torchs_own(step, padding, gap, monkeypatch):
    in_double = importlib.import_module("fxfuse.verify.in_double")
    monkeypatch.setattr(in_double, "_CACHED", 0)
    x, weight, bias = (torch.randn(s, dtype=torch.float64) for s in ((2, 5, 50), (6, 5, 4), (6,)))
    for more in ((x, weight, bias), (x, weight)):
        options = {"stride": [step], "padding": [padding], "dilation": [gap]}
        expected = torch.ops.aten.conv1d.default(*more, **options)
        torch.testing.assert_close(in_double.conv1d(*more, **options), expected)
