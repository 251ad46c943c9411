"""Writes in place become values (fxfuse/graph/functional.py)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import fxfuse


class Writes(nn.Module):
    def __init__(self, write: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 6)
        self.write = write

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.write(self.layer(x))


def through_a_slice(y: torch.Tensor) -> torch.Tensor:
    y[:, 1:3].mul_(2.0)
    return y


def through_a_step(y: torch.Tensor) -> torch.Tensor:
    y[:, ::2] = y[:, 1::2]
    return y


def through_an_index(y: torch.Tensor) -> torch.Tensor:
    y[:, -1].fill_(3.0)
    return y


def a_broadcast_row(y: torch.Tensor) -> torch.Tensor:
    y[:, 1:4] = torch.ones(3)
    return y


def of_another_dtype(y: torch.Tensor) -> torch.Tensor:
    y[:, 1:4] = torch.arange(3)
    return y / 2


def by_a_tensor(y: torch.Tensor) -> torch.Tensor:
    y[:, 1:4].fill_(y[0, 5])
    return y


def through_views_of_views(y: torch.Tensor) -> torch.Tensor:
    y.view(-1, 2, 3).transpose(1, 2)[:, 1].add_(1.0)
    return y


def read_by_an_earlier_view(y: torch.Tensor) -> torch.Tensor:
    early = y[:, 2:]
    y.relu_()
    return early


def read_by_an_earlier_row(y: torch.Tensor) -> torch.Tensor:
    early, late = y[:, 2], y[:, 1:]
    late.mul_(3.0)
    return early + y.sum(1)


def into_a_copy(y: torch.Tensor) -> torch.Tensor:
    flat = y.view(-1, 2, 3).transpose(1, 2).reshape(-1, 6)
    flat.mul_(2.0)
    return y + flat


def through_a_reshape(y: torch.Tensor) -> torch.Tensor:
    y.reshape(-1, 2, 3).flatten(0, 1).mul_(2.0)
    return y


def twice(y: torch.Tensor) -> torch.Tensor:
    z = y.add_(1.0)
    z[:, :2].mul_(2.0)
    return y.mul_(z)


CASES = [
    through_a_slice,
    through_a_step,
    through_an_index,
    a_broadcast_row,
    of_another_dtype,
    by_a_tensor,
    through_views_of_views,
    read_by_an_earlier_view,
    read_by_an_earlier_row,
    into_a_copy,
    through_a_reshape,
    twice,
]


@pytest.mark.parametrize("write", CASES, ids=lambda f: f.__name__)
def test_same_outputs_without_a_write(write: Callable[[torch.Tensor], torch.Tensor]):
    model, x = Writes(write), torch.randn(5, 4)
    program = fxfuse.capture(model, x)
    torch.testing.assert_close(program.module(x), model(x))
    targets = [n.target for n in program.graph.nodes if n.op == "call_function"]
    assert not [t for t in targets if getattr(getattr(t, "_schema", None), "is_mutable", False)]


@pytest.mark.parametrize(
    "place",
    [slice(0, 2), slice(2, None), slice(1, -1), slice(None), slice(None, None, 2), 1],
    ids=str,
)
def test_complex_writes_have_the_members_gradients(place: slice | int):
    class Spectrum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.fft.rfft(self.layer(x))
            out = torch.zeros(y.shape, dtype=y.dtype) + y.flip(1)
            out[:, place] = 2 * y[:, place]
            return torch.view_as_real(out).flatten(1)

    torch.manual_seed(0)
    network, x = Spectrum(), torch.randn(3, 4)
    written = fxfuse.capture(network.eval(), x).module
    for module in (network, written):
        module(x).square().sum().backward()
    mine, theirs = (dict(m.named_parameters())["layer.weight"].grad for m in (network, written))
    torch.testing.assert_close(mine, theirs)


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 6)
        self.register_buffer("total", torch.zeros(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x)
        self.total.add_(y.mean(0))
        return y


def test_a_write_into_the_module_stays():
    program = fxfuse.capture(Counts(), torch.randn(5, 4))
    before = program.tensor("total").clone()
    program.module(torch.randn(5, 4))
    assert not torch.equal(program.tensor("total"), before)
