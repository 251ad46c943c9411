"""Modules that are one program are exported once, and no others are taken for one."""

from __future__ import annotations

import functools
import random
import types
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import fxfuse
from fxfuse.errors import MemberError
from fxfuse.graph.export_reuse import are_twins, reuse_export
from fxfuse.graph.tensors import tensors_in
from tests.nets import SmallResNet, images, resnets


@dataclass
class Config:
    """What a network of a hub has in an attribute."""

    scale: float


class Net(nn.Module):
    """Has an attribute of every kind that is compared."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(4, 6), nn.Linear(6, 4), nn.BatchNorm1d(6)
        self.register_buffer("shift", torch.arange(6.0), persistent=False)
        self.constant = torch.ones(6)
        self.again = [self.first.weight]
        self.config, self.sizes = Config(2.0), {"a": (1, 2), "b": {3}}
        self.act: Callable[..., torch.Tensor] = functools.partial(nn.functional.elu, alpha=0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.first(x)) * self.config.scale + self.shift + self.constant
        return self.second(self.act(x))


def inputs() -> torch.Tensor:
    return torch.randn(3, 4)


@pytest.mark.filterwarnings("ignore:captured with a static batch", "ignore:The tensor attributes")
@pytest.mark.parametrize("build", [lambda: nn.LSTM(4, 6), lambda: SmallResNet()])
def test_a_twin_is_what_its_own_export_gives(build: Callable[[], nn.Module]):
    first, model = build(), build()
    x = images() if hasattr(first, "fc") else torch.randn(3, 5, 4)
    found, own = reuse_export(fxfuse.capture(first, x), model), fxfuse.capture(model, x)
    assert found is not None
    assert found.source is model
    assert found.module.code == own.module.code
    assert (found.names, found.canonical) == (own.names, own.canonical)
    assert all(found.tensor(name) is own.tensor(name) for name in own.names)
    assert torch.equal(
        *(torch.cat([t.flatten() for t in tensors_in(c.module(x))]) for c in (found, own))
    )


def test_twins_are_exported_once(monkeypatch: pytest.MonkeyPatch):
    asked = []
    original = torch.export.export
    monkeypatch.setattr(
        torch.export, "export", lambda *args, **kwargs: asked.append(1) or original(*args, **kwargs)
    )
    members, x = list(resnets(3)), images()
    fused = fxfuse.fuse(members, x)
    assert len(asked) == 1
    # Of the last one nobody can tell that the forward pass does not read this.
    members[2].unused = object()  # type: ignore[assignment]
    assert torch.equal(fxfuse.fuse(members, x).module(x), fused.module(x))
    assert len(asked) == 3


def changed(net: Net, how: str) -> None:
    """Makes another program of a network, or one of which nobody can tell."""
    if how == "a number":
        net.norm.eps = 0.5
    elif how == "an attribute of an object":
        net.config.scale = 3.0
    elif how == "a keyword":
        net.act = functools.partial(nn.functional.elu, alpha=0.7)
    elif how == "a function":
        net.act = lambda x: x.relu()
    elif how == "a method":
        net.forward = types.MethodType(lambda self, x: self.first(x), net)  # type: ignore[assignment]
    elif how == "a hook":
        net.first.register_forward_hook(lambda module, args, output: output + 1)
    elif how == "a tensor":
        net.constant = torch.zeros(6)
    elif how == "a buffer that is not stored":
        net.shift = torch.zeros(6)
    elif how == "a tied weight":
        net.second = nn.Linear(4, 6)
        net.second.weight = net.first.weight
    elif how == "a reference":
        net.again = [net.second.weight]
    elif how == "a class":
        net.norm.__class__ = type("Norm", (nn.BatchNorm1d,), {})
    elif how == "a container":
        net.sizes["b"].add(4)
    elif how == "a shape":
        net.second = nn.Linear(6, 5)
    elif how == "a mode":
        net.norm.training = False
    elif how == "what is not in attributes":
        net.random.random()


CHANGES = [
    "a number",
    "an attribute of an object",
    "a keyword",
    "a function",
    "a method",
    "a hook",
    "a tensor",
    "a buffer that is not stored",
    "a tied weight",
    "a reference",
    "a class",
    "a container",
    "a shape",
    "a mode",
    "what is not in attributes",
]


@pytest.mark.parametrize("how", CHANGES)
def test_strangers(how: str):
    first, other = Net(), Net()
    assert are_twins(first, other)
    if how == "what is not in attributes":
        # Equal at first, and nobody can see it.
        first.random, other.random = random.Random(0), random.Random(0)
    changed(other, how)
    assert not are_twins(first, other)
    assert not are_twins(other, first)


def test_another_program_is_refused_as_before():
    first, other = Net(), Net()
    other.config.scale = 3.0
    with pytest.raises(MemberError, match="member 1 differs from member 0"):
        fxfuse.fuse([first, other], inputs())
