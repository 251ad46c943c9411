"""What runs at another batch than the example's, and what says that it does not."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

import fxfuse
from fxfuse.errors import InputError
from tests.layers import LAYERS

X = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))


def fixed() -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval() for _ in range(2)]


@pytest.mark.parametrize("how", ["fuse", "stack", "pickle", "copy", "load"])
def test_a_fixed_batch_is_refused_at_another_size(how, tmp_path):
    made = fxfuse.stack if how == "stack" else fxfuse.fuse
    module = result = made(fixed(), fxfuse.Example(X, dynamic_shapes=({},)))
    if how != "stack":
        module = result.module
    expected = module(X)
    if how == "pickle":
        module = pickle.loads(pickle.dumps(module))
    elif how == "copy":
        module = copy.deepcopy(module)
    elif how == "load":
        fxfuse.save(result, tmp_path / "fused")
        module = fxfuse.load(tmp_path / "fused")
    assert torch.equal(module(X), expected)
    with pytest.raises(InputError, match="input input"):
        module(torch.cat([X, X]))


@pytest.mark.parametrize("width", [0.5, 1.5])
@pytest.mark.parametrize("name", ["EmbeddingBag mean", "MultiheadAttention bias_kv"])
def test_what_is_made_inside_follows_the_batch(name, width):
    """Offsets of bags, and zeros for batch times heads."""
    layer = LAYERS[name]
    result = fxfuse.fuse([layer.member(seed) for seed in range(2)], layer.example(), size=width)
    torch.manual_seed(1)
    inputs = layer.network.example(5)
    with torch.no_grad():
        together = result.module(*inputs)
        parts = [result.module(*(x[i : i + 2] for x in inputs)) for i in (0, 2, 3)]
    torch.testing.assert_close(together, torch.cat([parts[0], parts[1][:1], parts[2]]))
    assert len(together.flatten(1).unique(dim=0)) == 5


class Counts(nn.Module):
    """A network that asks how many examples there are."""

    def __init__(self, count: Callable[[torch.Tensor], int]) -> None:
        super().__init__()
        self.count, self.first, self.last = count, nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x).relu().view(self.count(x), 4, 2).flatten(1))


def test_the_length_of_a_tensor_leaves_the_batch_open():
    def length(x: torch.Tensor) -> int:
        return len(x)

    before = len
    result = fxfuse.fuse([Counts(length) for _ in range(2)], X)
    assert result.module(torch.randn(5, 3)).shape == (5, 2)
    assert len is before


def test_a_size_that_becomes_a_number_is_named():
    with pytest.warns(UserWarning, match=r"test_fixed_batch.py:\d+ .*int\(y.shape\[0\]\)"):
        program = fxfuse.capture(Counts(lambda y: int(y.shape[0])), X)
    assert not program.dynamic_batch
