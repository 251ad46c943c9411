"""Residual streams merged by what their readers make of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fxfuse
from fxfuse import Transplant
from fxfuse.activations import components
from fxfuse.activations.calibration import CalibrationBatches
from fxfuse.activations.elimination import covariance_at, weights_at
from fxfuse.activations.streams import streams
from fxfuse.activations.units import consumer_inputs, consumers_of
from fxfuse.errors import InputError, PlanError
from fxfuse.members.fingerprint import digest_of
from tests.models import excite
from tests.nets import resnets
from tests.options import flat

WIDTH = 12


class Block(nn.Module):
    """A residual block: a norm, a hidden layer, and what `last` does with its output."""

    def __init__(self, last: Callable[[torch.Tensor], torch.Tensor] | None = None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 20), nn.Linear(20, WIDTH)
        self.last = last if last is not None else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.last(self.down(self.up(self.norm(x)).relu()))


class Stream(nn.Module):
    """Two residual blocks on a stream of tokens."""

    def __init__(self, middle: nn.Module | None = None) -> None:
        super().__init__()
        self.stem = nn.Linear(6, WIDTH)
        self.place = nn.Parameter(torch.randn(1, 5, WIDTH))
        self.blocks = nn.Sequential(Block(), middle or nn.Identity(), Block())
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks(self.stem(x) + self.place)
        return self.head(self.norm(x).mean(1))


class Scale(nn.Module):
    """A factor for each unit."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.rand(WIDTH) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


class Along(nn.Module):
    """A depthwise convolution over the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x.transpose(1, 2)).transpose(1, 2)


class Across(nn.Module):
    """A transposed convolution over the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose1d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x.transpose(1, 2)).transpose(1, 2)


def tokens(n: int) -> torch.Tensor:
    return torch.randn(n, 5, 6)


def members(n: int) -> list[nn.Module]:
    found = []
    for seed in range(n):
        torch.manual_seed(seed)
        found.append(excite(Stream(), tokens(32)))
    return found


@pytest.mark.parametrize(
    ("middle", "is_stream"),
    [
        (nn.Identity(), True),
        (nn.Dropout(0.1), True),
        (nn.Dropout1d(0.1), True),
        (nn.AlphaDropout(0.1), True),
        (nn.Linear(WIDTH, WIDTH), True),
        (Across(), True),
        (nn.ReLU(), False),
        (Scale(), False),
        (Along(), False),
        (nn.Tanh(), False),
    ],
)
def test_a_stream_meets_nothing_that_tells_its_units_apart(
    middle: nn.Module, is_stream: bool
) -> None:
    found = streams(fxfuse.analyze(Stream(middle).eval(), tokens(2)))
    if isinstance(middle, nn.Linear | Across):
        # The layer ends one stream and begins another.
        assert len(found) == 2
    else:
        assert len(found) == is_stream


def test_hidden_layers_and_residual_sums_behind_activations_are_none() -> None:
    graph = fxfuse.analyze(members(1)[0], tokens(2))
    hidden = {group.name for group in graph.groups if "up" in group.name}
    assert len(hidden) == 2
    assert not hidden & streams(graph)
    assert not streams(fxfuse.analyze(resnets(1)[0], torch.randn(2, 3, 8, 8)))


def test_no_choice_of_units_tells_the_readers_more() -> None:
    """What the readers' outputs lose is least of all mixtures, so also of all choices of units."""
    networks, x = members(2), tokens(200)
    graph = fxfuse.analyze(networks[0], x[:2])
    states = [network.state_dict() for network in networks]
    calibration = CalibrationBatches.of(graph.program, x)
    (name,) = streams(graph)
    sizes = {group.name: group.n_units for group in graph.groups}
    every = {
        g.name: np.stack([np.repeat([0, 1], g.n_units), np.tile(np.arange(g.n_units), 2)], 1)
        for g in graph.groups
    }
    readers = consumers_of(graph)[name]
    inputs = consumer_inputs(
        [graph] * 2, [{name: readers}] * 2, dict(enumerate(states)), calibration
    )
    covariance = torch.stack([covariance_at(inputs[r.layer], [r, r]) for r in readers]).mean(0)
    weights = []
    for reader in readers:
        own = [weights_at(graph, s, reader, {}, m, 0) for m, s in enumerate(states)]
        each = torch.block_diag(*own)
        at_reader = covariance_at(inputs[reader.layer], [reader, reader])
        weights.append(each / ((at_reader @ each) * each).sum().sqrt())
    outputs = torch.cat(weights, 1)

    def lost(mixture: torch.Tensor) -> float:
        """Variance of the outputs that the best linear prediction from zᵀP leaves."""
        seen = covariance @ mixture
        explained = seen @ torch.linalg.pinv(mixture.T @ seen) @ seen.T
        return float(((covariance - explained) @ outputs * outputs).sum())

    for count in (3, 8, WIDTH):
        found = components(graph, states, calibration, every, {**sizes, name: count}, 0)[name]
        mixture = torch.from_numpy(found)
        assert mixture.shape == (2 * WIDTH, count)
        best = lost(mixture)
        generator = torch.Generator().manual_seed(0)
        for _ in range(50):
            units = torch.randperm(2 * WIDTH, generator=generator)[:count]
            assert best <= lost(torch.eye(2 * WIDTH, dtype=torch.float64)[:, units]) + 1e-9
            other = torch.randn(2 * WIDTH, count, generator=generator).double()
            assert best <= lost(other) + 1e-9
        # As large as a member's unit, and uncorrelated.
        spread = mixture.T @ covariance @ mixture
        level = float(covariance.diagonal().mean())
        torch.testing.assert_close(spread, level * torch.eye(count).double(), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("heads", [(), ("norm", "head")])
def test_after_the_refit_a_narrow_one_is_closer_to_what_it_stands_for(heads: tuple[str, ...]):
    """Few units carry less than as many mixtures; of trained ones benchmarks.paper.gains tells."""
    networks, x = members(2), tokens(400)
    told = {"score": "obs", "calibration": x, "refit": True, "width": 0.5, "heads": heads}
    with torch.no_grad():
        answers = torch.stack([network(x) for network in networks])
    wanted = answers if heads else answers.mean(0, keepdim=True)
    errors = {}
    for variant in (None, "components"):
        result = fxfuse.fuse(networks, x[:2], **flat(variant=variant, **told))
        assert result.verification.passed
        with torch.no_grad():
            found = result.module(x)
        found = torch.stack(found) if heads else found[None]
        share = (found - wanted).square().mean((1, 2)) / wanted.var(1).mean(1)
        errors[variant] = float(share.mean())
    assert errors["components"] < errors[None]


@cache
def mixed() -> tuple[list[nn.Module], torch.Tensor, fxfuse.FusionResult]:
    """Two members, inputs, and what they were fused into."""
    networks, x = members(2), tokens(120)
    told = {"score": "obs", "variant": "components", "calibration": x}
    return networks, x, fxfuse.fuse(networks, x[:2], **flat(**told))


def test_the_plan_says_so_and_is_applied_again() -> None:
    networks, x, result = mixed()
    plan = fxfuse.FusionPlan.from_json(result.plan.to_json())
    assert plan.options["variant"] == "components"
    (name,) = streams(result.graph)
    assert len(plan.map_of(name).target) == 2 * WIDTH * WIDTH
    again = fxfuse.build(plan, networks, x[:2])
    for key, value in result.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key


def test_the_matrix_of_a_plan_is_short_and_guarded() -> None:
    *_, result = mixed()
    text = result.plan.to_json()
    value = json.loads(text)
    (name,) = streams(result.graph)
    (group,) = (g for g in value["maps"] if g["group"] == name)
    assert (group["units"], group["weight"]["type"]) == ([WIDTH, WIDTH], "<f4")
    # Four bytes an entry, of which base64 makes 5 1/3 letters; "read" is the same.
    assert len(json.dumps(group)) < 6 * 2 * WIDTH * WIDTH + 200

    def rejected(message: str, *, sign: bool = True, **changed: Any) -> None:
        before = dict(group["weight"])
        group["weight"] |= changed
        if sign:
            value["digest"] = digest_of(
                {k: v for k, v in value.items() if k not in ("note", "digest")}
            )
        with pytest.raises(PlanError, match=message):
            fxfuse.FusionPlan.from_json(json.dumps(value))
        group["weight"] = before

    letters = group["weight"]["base64"]
    rejected("edited", sign=False, base64=("A" if letters[0] != "A" else "B") + letters[1:])
    # With a digest that fits, the matrix itself has to be one.
    rejected(f"weight is a matrix of {2 * WIDTH * WIDTH - 3} entries", base64=letters[16:])
    rejected("not a matrix of float32 or float64", type="<i4")
    rejected("not a fusion plan", base64=letters[:-1] + "?")


def test_plans_that_list_every_entry_apply() -> None:
    networks, x, result = mixed()
    value = json.loads(result.plan.to_json())
    for place, entry in enumerate(result.plan.maps):
        lists = {k: np.asarray(v).tolist() for k, v in entry.entries()._asdict().items()}
        value["maps"][place] = {"group": entry.group, "n_units": entry.n_units, **lists}
    value["digest"] = digest_of(
        {key: v for key, v in value.items() if key not in ("note", "digest")}
    )
    listed = fxfuse.FusionPlan.from_json(json.dumps(value))
    again = fxfuse.build(listed, networks, x[:2])
    for key, tensor in result.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[key]), key


def test_without_streams_it_is_the_transplant() -> None:
    networks, x = resnets(2), torch.randn(120, 3, 8, 8)
    plans = [
        fxfuse.fuse(
            networks,
            x[:2],
            calibration=x,
            verify=False,
            refine=[],
            method=Transplant(score="obs", variant=v),
        ).plan
        for v in (None, "components")
    ]
    for one, other in zip(plans[0].maps, plans[1].maps, strict=True):
        assert np.array_equal(one.member, other.member)
        assert np.array_equal(one.unit, other.unit)


def test_it_needs_calibration_inputs() -> None:
    with pytest.raises(InputError, match="components"):
        fxfuse.fuse(members(2), tokens(2), method=Transplant(variant="components"))
