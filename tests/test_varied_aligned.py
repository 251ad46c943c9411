"""Alignment of members of different widths: what the maps are, and members that are the same."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fxfuse
from fxfuse import OptimalTransport, WeightMatching, Zip
from fxfuse.activations import unit_activations
from fxfuse.activations.calibration import CalibrationBatches
from fxfuse.analysis.coupling import CouplingGraph, analyze
from fxfuse.analysis.multi_width import multi_width
from fxfuse.errors import OptionError
from fxfuse.planning.context import State
from fxfuse.planning.methods import methods
from fxfuse.planning.plan import FusionPlan, UnitMap
from fxfuse.transform.resizing import emit_resized
from fxfuse.verify.check import as_double, relative_error
from tests.models import excite
from tests.nets import Residual, SmallResNet
from tests.options import planned

SIZES = (5, 9, 7)


def mlp(width: int) -> nn.Module:
    layers = [nn.Linear(6, width), nn.ReLU(), nn.Linear(width, width + 2), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width + 2, 3))


class Heads(nn.Module):
    """Attention with some heads between layers of a stream that mixes nothing."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.embed = nn.Linear(6, 5)
        self.qkv, self.out = nn.Linear(5, 12 * heads), nn.Linear(4 * heads, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(torch.stack([x, x.flip(-1), x.roll(2, -1)], 1)).relu()
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.head((x + self.out(y.flatten(2))).mean(1))


FAMILIES: dict[str, tuple[Callable[[int], nn.Module], tuple[int, ...], tuple[int, ...]]] = {
    "mlp": (mlp, (6,), (5, 8)),
    "resnet": (SmallResNet, (3, 8, 8), (6, 10)),
    "heads": (Heads, (6,), (2, 4)),
}


def made(make: Callable[[int], nn.Module], width: int, seed: int, x: torch.Tensor) -> nn.Module:
    torch.manual_seed(seed)
    return excite(make(width).double(), x)


def inputs_of(family: str, n: int = 40) -> torch.Tensor:
    return torch.randn(n, *FAMILIES[family][1], dtype=torch.float64)


@cache
def unrelated() -> tuple[CouplingGraph, list[State], torch.Tensor]:
    x = inputs_of("mlp")
    program = [fxfuse.capture(made(mlp, w, seed, x), x[:4]) for seed, w in enumerate(SIZES)]
    graph = multi_width(analyze(program[0]), program, analyze)
    return graph, [as_double(c.state()) for c in program], x


def answers(graph: CouplingGraph, states: list[State], x: torch.Tensor) -> dict[str, Any]:
    """What the hidden layers of the MLPs answer."""
    names, each = [group.name for group in graph.groups], []
    for state in states:
        first = (x @ state["0.weight"].T + state["0.bias"]).relu()
        each.append((first, (first @ state["2.weight"].T + state["2.bias"]).relu()))
    return {name: [pair[i] for pair in each] for i, name in enumerate(names)}


def matrices(unit_map: UnitMap, member: int, units: int) -> tuple[np.ndarray, np.ndarray]:
    """M of a member and its Uᵀ, [fused, units]."""
    target, unit = unit_map.of_member(member)
    found = np.zeros((2, unit_map.n_units, units))
    for which, weights in enumerate(unit_map.weights_of(member)):
        np.add.at(found[which], (target, unit), weights)
    return found[0], found[1]


# --- definitions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["average", "weight_matching", "activation_matching"])
@pytest.mark.parametrize("reference", [0, 1, "mean"])
def test_each_fused_unit_is_the_mean_of_those_that_stand_for_it(method: str, reference: int | str):
    graph, states, x = unrelated()
    options = {"reference": reference, "activations": answers(graph, states, x)}
    frame = 0 if reference == "mean" else int(reference)
    for unit_map in planned(graph, states, method, **options).maps:
        n = graph.units_of(unit_map.group, frame)
        assert unit_map.n_units == n
        sizes = [graph.units_of(unit_map.group, member) for member in range(3)]
        pairs = [matrices(unit_map, member, size) for member, size in enumerate(sizes)]
        np.testing.assert_allclose(sum(m.sum(1) for m, _ in pairs), 1)
        count = sum((m > 0).astype(int).sum(1) for m, _ in pairs)
        for (m, u), size in zip(pairs, sizes, strict=True):
            if method != "activation_matching":
                assert (m > 0).sum() == min(n, size)
            assert (m > 0).sum(0).max() == (m > 0).sum(1).max() == 1
            np.testing.assert_allclose((m * count[:, None])[m > 0], 1)
            np.testing.assert_allclose(u[m > 0], 1)
            # What stands for no fused unit is read off one of them.
            assert ((u != 0).sum(0) <= 1).all()
            if method != "activation_matching":  # A dead unit is read off nothing there.
                left = (m > 0).sum() < size
                assert ((u != 0).sum() > (m > 0).sum()) == (method != "average" and left)
        if method == "average":
            assert all((m > 0)[: min(m.shape), : min(m.shape)].diagonal().all() for m, _ in pairs)


def test_a_rectangular_assignment_is_the_best_of_all():
    """Against every way to choose three of five."""
    graph = analyze(nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2)), torch.ones(2, 3))
    wide = analyze(nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)), torch.ones(2, 3))
    both = [graph.program, wide.program]
    graph = multi_width(graph, both, analyze)
    a, b = torch.randn(20, 3).double(), torch.randn(20, 5).double()
    b = b + 0.5 * b.roll(1, 1)
    options = {"activations": {graph.groups[0].name: [a, b]}}
    states = [c.state() for c in both]
    (unit_map,) = planned(graph, states, "activation_matching", **options).maps
    m, u = matrices(unit_map, 1, 5)
    found = np.corrcoef(a.T, b.T)[:3, 3:]
    best = max(found[range(3), list(p)].sum() for p in itertools.permutations(range(5), 3))
    assert found[m > 0].sum() == pytest.approx(best)
    chosen = m.argmax(1)
    for unit in set(range(5)) - set(chosen.tolist()):
        fits = [np.linalg.lstsq(b[:, [c]], b[:, unit], rcond=None) for c in chosen]
        best_fit = min(range(3), key=lambda k: fits[k][1][0])
        assert u[best_fit, unit] == pytest.approx(fits[best_fit][0][0])
        assert np.count_nonzero(u[:, unit]) == 1


@pytest.mark.parametrize("variant", ["weights", "activations"])
@pytest.mark.parametrize("regularisation", [None, 0.1])
def test_transports_carry_uniform_masses(variant: str, regularisation: float | None):
    graph, states, x = unrelated()
    activations = answers(graph, states, x)
    options = {
        "variant": variant,
        "reference": 2,
        "regularisation": regularisation,
        "activations": activations,
    }
    for unit_map in planned(graph, states, "optimal_transport", **options).maps:
        n = graph.units_of(unit_map.group, 2)
        for member in range(3):
            size = graph.units_of(unit_map.group, member)
            m, u = matrices(unit_map, member, size)
            assert (m >= 0).all()
            np.testing.assert_allclose(m.sum(1) * 3, 1, atol=1e-6)
            np.testing.assert_allclose(u.sum(0), 1, atol=1e-6)
            # M = nT/N and Uᵀ = mT.
            np.testing.assert_allclose(u * n, m * 3 * size, atol=1e-6)


@pytest.mark.parametrize(("variant", "width"), [(None, None), (None, 1.5), ("across", None)])
def test_zip_divides_all_units_into_as_many_clusters_as_are_asked_for(
    variant: str | None, width: float | None
):
    graph, states, x = unrelated()
    wanted = {}
    for group in graph.groups:
        sizes = [graph.units_of(group.name, member) for member in range(3)]
        wanted[group.name] = max(sizes) if variant else round(sum(sizes) / 3 * (width or 1))
    options = {
        "variant": variant,
        "activations": answers(graph, states, x),
        "sizes": None if variant else wanted,
    }
    for unit_map in planned(graph, states, "zip", **options).maps:
        assert unit_map.n_units == wanted[unit_map.group]
        sizes = [graph.units_of(unit_map.group, member) for member in range(3)]
        every = {(i, k) for i, size in enumerate(sizes) for k in range(size)}
        pairs = list(zip(unit_map.member.tolist(), unit_map.unit.tolist(), strict=True))
        assert len(pairs) == len(set(pairs))
        alive = options["activations"][unit_map.group]
        dead = {(i, k) for i, k in every if not alive[i][:, k].any()}
        assert set(pairs) == every - dead
        both = [matrices(unit_map, member, size) for member, size in enumerate(sizes)]
        m, u = (np.concatenate([pair[k] for pair in both], axis=1) for k in (0, 1))
        np.testing.assert_allclose(u.T, np.linalg.pinv(m), atol=1e-12)
        if variant:
            assert max((mm > 0).sum(1).max() for mm, _ in both) == 1


# --- identity oracle ------------------------------------------------------------------------------


def copies(narrow: int, wide: int, generator: np.random.Generator) -> np.ndarray:
    """Of which narrow unit each wide one is a copy, in any order."""
    extra = generator.integers(narrow, size=wide - narrow)
    return generator.permutation(np.concatenate([np.arange(narrow), extra]))


def shares(source: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Which part of what readers make of a unit each of its copies gets."""
    drawn = generator.uniform(0.2, 0.8, len(source))
    return drawn / np.bincount(source, drawn)[source]


def even(narrow: int, wide: int, generator: np.random.Generator) -> np.ndarray:
    return generator.permutation(np.tile(np.arange(narrow), wide // narrow))


def widened(
    narrow: CouplingGraph,
    wide: CouplingGraph,
    state: State,
    kind: str,
    generator: np.random.Generator,
) -> dict[str, torch.Tensor]:
    """The tensors of a wider network that answers as a narrow one does.

    Kinds: `copied`, units stand several times and share what is made of them; `doubled`, all of
    them equally often; `unread`, further units are written at random, and nobody reads them;
    `silent`, further units answer 0, and readers weigh them at random.
    """
    groups = {group.name: group for group in wide.groups}
    moves = {}
    for group in narrow.groups:
        sizes = group.n_units, groups[group.name].n_units
        if kind in ("unread", "silent"):
            source = generator.permutation(
                np.concatenate([np.arange(sizes[0]), np.full(sizes[1] - sizes[0], -1)])
            )
            moves[group.name] = source, (source >= 0).astype(float)
        else:
            source = (even if kind == "doubled" else copies)(*sizes, generator)
            moves[group.name] = source, shares(source, generator)
    found = {}
    for name in narrow.program.names:
        tensor = state[name]
        for dim in range(tensor.dim()):
            for group in narrow.group_of.get((name, dim), ()):
                source, share = moves[group.name]
                reads = (name, dim) in narrow.readers
                here, there = group.index[(name, dim)], groups[group.name].index[(name, dim)]
                front = tensor.movedim(dim, 0)
                size = wide.program.tensor(name).shape[dim]
                new = front.new_zeros(size, *front.shape[1:])
                for unit, (origin, part) in enumerate(zip(source, share, strict=True)):
                    if origin >= 0:
                        new[there[unit]] = front[here[origin]] * (part if reads else 1.0)
                    elif reads == (kind == "silent"):
                        shape = len(there[unit]), *front.shape[1:]
                        drawn = torch.from_numpy(generator.standard_normal(shape))
                        new[there[unit]] = drawn.abs() if name.endswith("var") else drawn
                tensor = new.movedim(0, dim)
        found[name] = tensor
    return found


#: Which methods see through a widening. Index by index, a copy is another unit; uniform masses
#: count dead units, and copies by how many there are; who looks at answers sees what nobody reads.
SEEN = {
    "copied": ("weight_matching", "activation_matching", "zip"),
    "doubled": ("weight_matching", "activation_matching", "zip", "optimal_transport"),
    "unread": ("weight_matching", "activation_matching"),
    "silent": ("weight_matching", "activation_matching", "zip"),
}


@cache
def analyzed(family: str, *, doubled: bool) -> tuple[CouplingGraph, list[nn.Module], torch.Tensor]:
    """Two members of different widths, and their analysis."""
    make, _, (small, large) = FAMILIES[family]
    if doubled:
        make, large = doubling if family == "mlp" else make, 2 * small
    x = inputs_of(family)
    members = [made(make, width, seed, x) for seed, width in enumerate((small, large))]
    program = [fxfuse.capture(member, x[:4]) for member in members]
    return multi_width(analyze(program[0]), program, analyze), members, x


def doubling(width: int) -> nn.Module:
    layers = [nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 2 * width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(2 * width, 3))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", SEEN)
@pytest.mark.filterwarnings("ignore:40 calibration inputs are few")
def test_a_member_and_itself_widened_are_the_member(family: str, kind: str):
    """Whichever of the two is the reference."""
    graph, members, x = analyzed(family, doubled=kind == "doubled")
    narrow, wide = graph.members
    state, generator = as_double(narrow.program.state()), np.random.default_rng(3)
    states = [state, widened(narrow, wide, state, kind, generator)]
    with torch.no_grad():
        expected = members[0](x)
        found = torch.func.functional_call(members[1], states[1], x)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        assert relative_error([expected.flip(0)], [expected]) > 0.01
    calibration = CalibrationBatches.of(graph.program, x)
    activations = unit_activations(graph, states, calibration)

    def error(method: str, reference: int) -> float:
        sizes = {g.name: g.n_units for g in graph.of_member(reference).groups}
        options = {"activations": activations, "sizes": sizes}
        if method != "zip":
            options["reference"] = reference
        plan = planned(graph, states, method, **options)
        assert plan.sizes() == sizes
        with torch.no_grad():
            return relative_error([emit_resized(graph, plan, states)(x)], [expected])

    for method, reference in itertools.product(SEEN[kind], (0, 1)):
        assert error(method, reference) < 1e-9, (method, reference)
    # Without alignment, they are far apart.
    assert error("average", 0) > 1e-3


# --- the whole way --------------------------------------------------------------------------------


def test_the_reference_decides_the_width():
    x = inputs_of("mlp")
    members = [made(mlp, width, seed, x) for seed, width in enumerate((5, 9))]
    for reference, size in ((0, 5), (1, 9), ("mean", 5)):
        result = fxfuse.fuse(members, x[:4], method=WeightMatching(reference=reference))
        assert result.plan.sizes()["0.weight:0"] == size
        assert result.module.get_parameter("0.weight").shape[0] == size
    again = fxfuse.build(FusionPlan.from_json(result.plan.to_json()), members, x[:4])
    torch.testing.assert_close(again.state_dict(), result.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("method", ["average", "weight_matching"])
def test_a_member_without_a_block_has_no_units_in_it(method: str):
    """Its zeros are not averaged with the units of the others; the stream is the mean, though."""
    x = inputs_of("mlp")
    shallow, deep = (Residual(blocks, 6, 5, 4).double().eval() for blocks in (1, 2))
    deep.load_state_dict({**deep.state_dict(), **shallow.state_dict()})
    with pytest.raises(OptionError, match=r"lacks this block(.|\n)*pass reference=1"):
        fxfuse.fuse([shallow, deep], x[:4], method=method)
    result = fxfuse.fuse([shallow, deep], x[:4], method=methods()[method](reference=1))
    torch.testing.assert_close(
        result.module.get_parameter("blocks.1.0.weight"), deep.blocks[1][0].weight
    )
    with torch.no_grad():
        stream = x @ deep.stem.weight.T + deep.stem.bias
        stream = stream + deep.blocks[0](stream)
        expected = deep.head(stream + deep.blocks[1](stream) / 2)
        torch.testing.assert_close(result.module(x), expected)


def test_what_has_no_meaning_is_named():
    x = inputs_of("mlp")
    members = [made(mlp, width, seed, x) for seed, width in enumerate((5, 9))]
    with pytest.raises(OptionError, match="leave the size out, or use"):
        fxfuse.fuse(members, x[:4], method="weight_matching", size=1)
    with pytest.raises(OptionError, match="variant 'across' of zip has no width"):
        fxfuse.fuse(members, x[:4], calibration=x, size=1, refine=[], method=Zip(variant="across"))
    with pytest.raises(OptionError, match="transports every member"):
        fxfuse.fuse(members, x[:4], method=OptimalTransport(reference="mean"))
