"""Oracle 5: what holds of the architectures that we know holds of random networks.

The oracles are named in DESIGN.md section 7. Here a `RewriteError` is a failure too.
"""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings

import fxfuse
from fxfuse import verify
from fxfuse.analysis.labels import Kind
from fxfuse.graph.rebuild import rebuild
from fxfuse.transform.apply import permuted, random_permutations
from tests.fusing import check_without_repetitions
from tests.strategies import (
    BLOCKS,
    IMAGE,
    TOKENS,
    Block,
    Recipe,
    Space,
    build,
    is_plain,
    members_of,
    recipes,
)

#: How many examples: by profile (tests/conftest.py; `--hypothesis-profile=nightly` for thousands).
_any = settings(suppress_health_check=list(HealthCheck))

#: Blocks in which channels are in order.
_ORDERED = {"local_response"}
#: Sums over neurons that no weight tells apart: two copies of a network give twice the sum, the
#: zeros between the weights of two copies count in the mean of all weights, the two largest
#: neurons are one and its copy, a softmax over two copies gives each of them half, and a square
#: matrix of channels is not the square of two halves.
_SUMMED = {"attention_one_head", "standardised", "extremes", "experts", "squared"}
#: Blocks that tie all neurons to one another, by kind and flag: there is one unit, and none free.
_TIED = {("roll", True)}
#: Parameters that no neuron owns: the mixer's output are tokens, a temperature or a norm of all
#: heads is shared by units that each need it in order, and the channels of a square are one unit.
_SHARED = {
    "mix_tokens": ("second.bias",),
    "temperature": ("factor",),
    "squared": ("layer.weight", "layer.bias"),
    "basis": ("knots",),
    "attention_normed": ("norm_q.weight", "norm_q.bias", "norm_k.weight", "norm_k.bias"),
}


def check_oracles(recipe: Recipe, n: int) -> fxfuse.CouplingGraph:
    """Permutation, wide and fusion on `n` members of one architecture; returns the analysis."""
    members = members_of(recipe, n)
    graph = fxfuse.analyze(members[0])
    check_permutation(graph)
    check_without_repetitions(graph)
    wide = verify.concatenation_equals_ensemble(members)
    assert wide.passed, wide
    kinds = {block.kind for block in (*recipe.images, *recipe.tokens, *recipe.vectors)}
    if is_plain(recipe):
        assert wide.tolerance < float("inf"), wide.detail
    if not kinds & (_ORDERED | _SUMMED):
        check_copies(graph)
    with warnings.catch_warnings():
        # A group that the permutation oracle cannot move freezes with a warning.
        warnings.simplefilter("error", UserWarning)
        result = fxfuse.fuse(members)
    assert result.verification.passed
    assert tuple(result.state_dict()) == members[0].names
    return graph


def check_permutation(graph: fxfuse.CouplingGraph) -> None:
    # Groups of two units: every second permutation leaves them alone.
    for seed in range(3):
        check = verify.permutation_of(graph, seed=seed)
        assert check.passed, check
    assert verify.sensitivity(graph.program) > 1e-6


def check_copies(graph: fxfuse.CouplingGraph) -> None:
    """A network beside its permuted copy is the network, even where a norm mixes the two."""
    program = graph.program
    moves = random_permutations(graph.groups, np.random.default_rng(1))
    state = permuted(program.state(), graph, moves)
    twin = replace(program, module=rebuild(program.module, state))
    wide = verify.concatenation_equals_ensemble([program, twin])
    assert wide.error <= verify.EXACT, wide


@_any
@given(recipes())
def test_any_network(recipe: Recipe):
    check_oracles(recipe, 2)


@_any
@given(recipes(plain=True))
def test_network_without_a_mixing_operator(recipe: Recipe):
    check_oracles(recipe, 3)


def alone(kind: str, space: Space, flag: bool) -> Recipe:
    block = (Block(kind, 3, 2, flag),)
    if space is IMAGE:
        return Recipe(images=block)
    return Recipe(bridge="tokens", tokens=block) if space is TOKENS else Recipe(vectors=block)


ALONE = [
    pytest.param(kind, space, flag, id=f"{kind}-{space.name}-{int(flag)}")
    for kind in BLOCKS
    for space in BLOCKS[kind].spaces
    for flag in (False, True)
]


@pytest.mark.parametrize(("kind", "space", "flag"), ALONE)
def test_block(kind: str, space: Space, flag: bool):
    graph = check_oracles(alone(kind, space, flag), 2)
    if kind in _ORDERED:
        assert {reason.kind for reason in graph.frozen.values()} >= {Kind.KEEP_BASE}
        return
    if (kind, flag) in _TIED:
        assert graph.single_units
        return
    assert graph.free_fraction > 0.9
    inside = {IMAGE: "images.", TOKENS: "tokens."}.get(space, "vectors.")
    own = {name for name, _ in build(alone(kind, space, flag)).named_parameters()}
    own = {name for name in own if name.startswith(inside)} & graph.program.reached()
    free = {name for name, _ in graph.group_of}
    assert own <= free | {f"{inside}0.{name}" for name in _SHARED.get(kind, ())}


#: Networks that have failed: the blocks between a layer and a layer.
FOUND = {
    "a constant that is written to": (Block("write_constant", 3), Block("residual", 2)),
    "a shuffled constant": (
        Block("write_constant", 3),
        Block("shuffle", 2, 2),
        Block("residual", 2),
    ),
    "padding before the addition": (Block("padded", 2, 2), Block("grouped", 2, 2)),
    "groups of shuffled channels": (Block("shuffle", 2, 2), Block("grouped", 2, 2)),
    "norm groups of shuffled channels": (Block("shuffle", 2, 2), Block("group_norm", 2, 2)),
    "groups across a concatenation": (Block("dense", 2, 2), Block("grouped", 2, 2)),
    "two outputs of a shuffled channel": (Block("shuffle", 2, 2), Block("depthwise", 2, 2, True)),
    "residual around shuffled channels": (Block("shuffle", 2, 2), Block("residual", 2, 2)),
    "groups of the same neurons": (Block("interleave", 2, 2), Block("grouped", 2, 2)),
    "one neuron in each half": (Block("interleave", 2, 2, True), Block("halves", 2, 2)),
    "a unit in each half": (Block("grouped", 2, 2), Block("branches", 2, 2)),
    "outputs of a channel in a shuffled residual": (
        Block("grouped", 4, 3, True),
        Block("depthwise", 2, 2, True),
        Block("shuffle", 3, 2),
        Block("residual", 2, 2),
    ),
    "units of other parts": (
        Block("layer", 3),
        Block("padded", 2, 2, True),
        Block("tied_branches", 2),
    ),
    "one unit in all groups": (
        Block("layer", 2),
        Block("shuffle", 2, 3),
        Block("pooled", 2, 3, True),
        Block("group_norm", 2, 3),
    ),
    "groups of one unit whose outputs are tied": (
        Block("glu", 3, 3),
        Block("pooled", 3, 3, True),
        Block("group_norm", 4, 3),
        Block("transposed_grouped", 2, 2),
    ),
    "all outputs of a depthwise convolution in one unit": (
        Block("depthwise", 2, 3, True),
        Block("every_second", 4, 3, True),
        Block("residual", 2, 2, True),
    ),
    "which part of two branches": (
        Block("interleave", 4, 2, True),
        Block("interleave", 3, 2),
        Block("shuffle", 4, 3, True),
        Block("scale"),
    ),
    "shuffled outputs of shuffled groups": (
        Block("shuffle", 3, 3),
        Block("grouped", 3, 2),
        Block("shuffle", 2, 3),
    ),
    "halves of two branches": (Block("interleave", 2, 2, True), Block("tied_branches", 3)),
    "the places of one neuron roll": (Block("repeat", 2, 2), Block("roll", 3, 2)),
    "groups read the same neurons": (Block("repeat", 2, 2), Block("transposed_grouped", 2, 2)),
    "pixels of one channel": (Block("pixel_shuffle", 2, 2), Block("pooled", 2, 2)),
    "a part is written to": (Block("write_slice", 3, 2), Block("write_slice", 2, 3, True)),
    "groups of one unit": (
        Block("interleave", 3, 2),
        Block("group_norm", 3, 3),
        Block("grouped", 3, 2),
    ),
}


FOUND_WITH_TOKENS = {
    "rotary positions of two frequencies": Recipe(
        bridge="tokens", tokens=(Block("attention_rotary", 4, 2, True),)
    ),
    "a pool of the pixels of one unit": Recipe(
        images=(Block("pixel_shuffle", 2),), bridge="tokens", tokens=(Block("roll", flag=True),)
    ),
}


@pytest.mark.parametrize(
    "recipe",
    [
        *(Recipe(6, (Block("layer", 6), *blocks, Block("layer", 3))) for blocks in FOUND.values()),
        *FOUND_WITH_TOKENS.values(),
    ],
    ids=[*FOUND, *FOUND_WITH_TOKENS],
)
def test_network_that_failed_once(recipe: Recipe):
    members = members_of(recipe, 2)
    check_permutation(fxfuse.analyze(members[0]))
    wide = verify.concatenation_equals_ensemble(members)
    assert wide.passed, wide
    assert wide.tolerance < float("inf") or not is_plain(recipe), wide.detail


def test_a_constant_behind_a_weight_and_its_transpose():
    """The transpose writes the sum of the members into an index that all of them share."""
    blocks = (Block("write_constant", 2, 2, True), Block("tied_transposed", 3, 2))
    members = members_of(Recipe(2, bridge="tokens", tokens=blocks), 2)
    wide = verify.concatenation_equals_ensemble(members)
    assert wide.tolerance == float("inf")
    assert "tokens.1.layer.weight is averaged" in wide.detail


class Lambdas(torch.nn.Module):
    """Two branches, each with a factor that is read by its index."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(6, 8), torch.nn.Linear(6, 8)
        self.factors = torch.nn.Parameter(torch.tensor([0.3, 2.0]))
        self.head = torch.nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(
            (self.factors[0] * self.first(x) + self.factors[1] * self.second(x)).tanh()
        )


def test_parameters_that_are_read_by_their_index_stay():
    graph = fxfuse.analyze(Lambdas().double(), torch.randn(4, 6, dtype=torch.float64))
    check_permutation(graph)
    assert "a single neuron is cut out" in graph.frozen[("factors", 0)].why
    assert ("first.weight", 0) in graph.group_of


class Blur(torch.nn.Module):
    """A fixed filter for every channel, as anti-aliasing networks have it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Conv2d(3, 6, 3, padding=1)
        self.last = torch.nn.Conv2d(6, 4, 3)
        self.register_buffer("filter", torch.tensor([[1.0, 2.0, 1.0]]).expand(3, 3) / 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).relu()
        kernel = self.filter.expand(x.shape[1], 1, 3, 3)
        return self.last(torch.nn.functional.conv2d(x, kernel, groups=x.shape[1])).mean((2, 3))


def test_a_constant_filter_grows_with_the_channels():
    members, x = [Blur().double() for _ in range(2)], torch.randn(4, 3, 8, 8, dtype=torch.float64)
    check_permutation(fxfuse.analyze(members[0], x))
    wide = verify.concatenation_equals_ensemble(members, x)
    assert wide.passed, wide
    assert wide.tolerance == verify.EXACT, wide.detail
