"""Each method's maps satisfy their definition, and aligning permuted copies gives the network."""

from __future__ import annotations

import builtins
import itertools
import sys
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

import fxfuse
from fxfuse import Constraints, Transplant
from fxfuse.analysis.coupling import CouplingGraph
from fxfuse.errors import (
    InputError,
    MissingDependencyError,
    OptionError,
)
from fxfuse.planning.methods._clusters import Clusters
from fxfuse.planning.methods.cluster import clusters
from fxfuse.planning.plan import UnitMap
from fxfuse.transform.apply import fused_tensors
from fxfuse.verify.check import as_double
from tests.fusing import activations, distance_to_the_first, permuted_copies
from tests.models import excite, torchvision
from tests.nets import SmallResNet, images, resnets
from tests.options import flat, planned

CALIBRATED = ("activation_matching", "cluster", "partial", "zip")


def small(name: str) -> tuple[nn.Module, torch.Tensor]:
    """A small network of a family, excited, in float64, and inputs."""
    torch.manual_seed(0)
    if name == "resnet":
        model, size = SmallResNet(), 8
    elif name == "vit":
        made = torchvision().models.VisionTransformer
        model, size = made(16, 4, 2, 4, 16, 24, num_classes=5), 16
    else:
        made = torchvision().models.DenseNet
        model, size = made(4, (2, 2), 8, bn_size=2, num_classes=5), 32
    x = torch.randn(16, 3, size, size).double()
    return excite(model.double(), x), x


@cache
def analyzed(name: str) -> CouplingGraph:
    return fxfuse.analyze(*small(name))


def lists(n_members: int) -> tuple[CouplingGraph, list[dict[str, torch.Tensor]]]:
    """An analysis and unrelated members."""
    x = images(dtype=torch.float64)
    program = [fxfuse.capture(m, x) for m in resnets(n_members, torch.float64)]
    return fxfuse.analyze(program[0]), [c.state() for c in program]


def matrix(unit_map: UnitMap, member: int, *, read: bool = False) -> np.ndarray:
    """M of a member, or Uᵀ, [fused, units]."""
    found = np.zeros((unit_map.n_units, unit_map.n_units))
    target, unit = unit_map.of_member(member)
    np.add.at(found, (target, unit), unit_map.weights_of(member)[int(read)])
    return found


def is_permutation(m: np.ndarray) -> bool:
    return bool(((m == 0) | (m == 1)).all() and (m.sum(0) == 1).all() and (m.sum(1) == 1).all())


# --- definitions ---


@pytest.mark.parametrize("n", [2, 3])
def test_average_keeps_indices(n: int):
    graph, states = lists(n)
    plan = planned(graph, states, "average")
    fused = fused_tensors(graph, plan, states)
    for name, tensor in fused.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, torch.stack([s[name] for s in states]).mean(0))


@pytest.mark.parametrize("method", ["weight_matching", "activation_matching"])
@pytest.mark.parametrize("reference", [0, 1, "mean"])
def test_matchings_are_permutations(method: str, reference: int | str):
    graph, states = lists(3)
    options = {"reference": reference, "activations": activations(graph, states)}
    plan = planned(graph, states, method, **options)
    assert plan.options == ({} if reference == 0 else {"reference": str(reference)})
    for unit_map in plan.maps:
        for member in range(3):
            assert is_permutation(matrix(unit_map, member) * 3)
            assert is_permutation(matrix(unit_map, member, read=True))
        if reference != "mean":
            assert (matrix(unit_map, reference) * 3 == np.eye(unit_map.n_units)).all()


def test_activation_matching_is_the_best_assignment():
    """Against every permutation of a group of four."""
    graph = fxfuse.analyze(
        nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.ones(2, 3)
    )
    states = [graph.program.state()] * 2
    a, b = torch.randn(20, 4).double(), torch.randn(20, 4).double()
    options = {"activations": {graph.groups[0].name: [a, b]}}
    (unit_map,) = planned(graph, states, "activation_matching", **options).maps
    found = np.corrcoef(a.T, b.T)[:4, 4:]
    chosen = unit_map.of_member(1)[1]
    best = max(found[range(4), list(p)].sum() for p in itertools.permutations(range(4)))
    assert found[range(4), chosen].sum() == pytest.approx(best)


@pytest.mark.parametrize("variant", ["weights", "activations"])
@pytest.mark.parametrize("regularisation", [None, 0.1])
def test_transports_have_uniform_marginals(variant: str, regularisation: float | None):
    graph, states = lists(3)
    options = {
        "variant": variant,
        "reference": 2,
        "regularisation": regularisation,
        "activations": activations(graph, states),
    }
    for unit_map in planned(graph, states, "optimal_transport", **options).maps:
        for member in range(3):
            m = matrix(unit_map, member) * 3
            assert (m >= 0).all()
            np.testing.assert_allclose(m.sum(0), 1, atol=1e-6)
            np.testing.assert_allclose(m.sum(1), 1, atol=1e-6)
            np.testing.assert_allclose(m, matrix(unit_map, member, read=True))
        assert (matrix(unit_map, 2) * 3 == np.eye(unit_map.n_units)).all()
        exact = [is_permutation((matrix(unit_map, i) * 3).round(9)) for i in range(2)]
        assert exact == [regularisation is None] * 2


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("variant", [None, "across"])
def test_zip_clusters_divide_all_units(n: int, variant: str | None):
    graph, states = lists(n)
    options = {"variant": variant, "activations": activations(graph, states)}
    within = 0
    for unit_map in planned(graph, states, "zip", **options).maps:
        pairs = list(zip(unit_map.member.tolist(), unit_map.unit.tolist(), strict=True))
        every = itertools.product(range(n), range(unit_map.n_units))
        assert sorted(pairs) == sorted(every), "each unit is in one cluster"
        assert set(unit_map.target.tolist()) == set(range(unit_map.n_units))
        m = np.concatenate([matrix(unit_map, i) for i in range(n)], axis=1)
        u = np.concatenate([matrix(unit_map, i, read=True) for i in range(n)], axis=1).T
        np.testing.assert_allclose(u, np.linalg.pinv(m), atol=1e-12)
        np.testing.assert_allclose(m.sum(1), 1)
        within += sum((matrix(unit_map, i) > 0).sum(1).max() > 1 for i in range(n))
    assert (within > 0) == (variant is None), "only the free variant merges within a member"


def plain_clusters(columns: np.ndarray, times: int) -> list[list[int]]:
    """Greedy clustering by the definition: correlations of mean activations, all pairs."""
    clusters = [[i] for i in range(columns.shape[1])]
    for _ in range(times):
        means = np.stack([columns[:, c].mean(axis=1) for c in clusters])
        correlation = np.corrcoef(means)
        np.fill_diagonal(correlation, -np.inf)
        i, j = sorted(np.unravel_index(correlation.argmax(), correlation.shape))
        clusters[i] += clusters.pop(j)
    return sorted(sorted(c) for c in clusters)


@pytest.mark.parametrize("seed", range(5))
def test_clusters_are_those_of_the_plain_algorithm(seed: int):
    columns = np.random.default_rng(seed).standard_normal((40, 24))
    clusters = Clusters(columns, np.repeat(np.arange(3), 8))
    clusters.merge(16)
    numbers = clusters.numbers()
    assert sorted(np.flatnonzero(numbers == k).tolist() for k in range(8)) == plain_clusters(
        columns, 16
    )


@pytest.mark.parametrize("count", [1, 5, 23, 24])
@pytest.mark.parametrize("weighted", [False, True])
def test_k_means_by_the_definition(count: int, weighted: bool):
    """Each unit is nearest to the weighted mean of its own cluster, and no cluster is empty."""
    rng = np.random.default_rng(count)
    points = rng.standard_normal((40, 24))
    weights = rng.integers(0, 3, 24).astype(float) if weighted else np.ones(24)
    cluster, share = clusters(points, weights, count)
    assert np.unique(cluster, return_index=True)[1].tolist() == sorted(
        np.flatnonzero(cluster == k)[0] for k in range(count)
    )
    means = np.stack([points[:, cluster == k] @ share[cluster == k] for k in range(count)], 1)
    for k in range(count):
        own = weights[cluster == k]
        expected = own / own.sum() if own.sum() else np.full(len(own), 1 / len(own))
        np.testing.assert_allclose(share[cluster == k], expected)
    far = np.linalg.norm(points[:, :, None] - means[:, None], axis=0)
    # A cluster of one unit is never emptied, however near others are.
    moves = np.bincount(cluster)[cluster] > 1
    np.testing.assert_allclose(far.min(1)[moves], far[range(24), cluster][moves])


def test_clusters_of_one_unit_are_a_transplant():
    graph, states = lists(2)
    found = activations(graph, states)
    sizes = {group.name: 2 * group.n_units for group in graph.groups}
    one, other = (
        planned(graph, states, name, activations=found, sizes=sizes)
        for name in ("cluster", "transplant")
    )
    for a, b in zip(one.maps, other.maps, strict=True):
        for member, read in itertools.product(range(2), (False, True)):
            np.testing.assert_array_equal(
                matrix(a, member, read=read), matrix(b, member, read=read)
            )


@pytest.mark.parametrize("size", [5, 6, 8])
def test_partial_fusion_matches_the_pairs_that_correlate_most_together(size: int):
    """Against every choice of so many pairs of two groups of four."""
    network = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    graph = fxfuse.analyze(network, torch.ones(2, 3))
    states = [graph.program.state()] * 2
    a, b = torch.randn(20, 4).double(), torch.randn(20, 4).double()
    name = graph.groups[0].name
    options = {"activations": {name: [a, b]}, "sizes": {name: size}}
    (unit_map,) = planned(graph, states, "partial", **options).maps
    assert unit_map.n_units == size
    found = np.corrcoef(a.T, b.T)[:4, 4:]
    one, other = [dict(zip(*unit_map.of_member(m), strict=True)) for m in range(2)]
    pairs = [(one[k], other[k]) for k in range(size) if k in one and k in other]
    choices = [
        sum(found[i, j] for i, j in zip(rows, columns, strict=True))
        for rows in itertools.combinations(range(4), 8 - size)
        for columns in itertools.permutations(range(4), 8 - size)
    ]
    assert sum(found[i, j] for i, j in pairs) == pytest.approx(max(choices))


@pytest.mark.parametrize("width", [0.5, 1, 1.5, 2.25, 3])
def test_partial_fusion_merges_units_of_different_members(width: float):
    graph, states = lists(3)
    sizes = {group.name: round(width * group.n_units) for group in graph.groups}
    options = {"activations": activations(graph, states), "sizes": sizes}
    for unit_map in planned(graph, states, "partial", **options).maps:
        assert unit_map.n_units == sizes[unit_map.group]
        count = np.bincount(unit_map.target, minlength=unit_map.n_units)
        for member in range(3):
            target, unit = unit_map.of_member(member)
            # Every unit is in one cluster: M its share of the mean, U one.
            assert np.sort(unit).tolist() == list(range(len(unit)))
            merge, unmerge = unit_map.weights_of(member)
            np.testing.assert_allclose(merge, 1 / count[target])
            np.testing.assert_array_equal(unmerge, np.ones(len(unit)))
            if width >= 1:
                assert len(np.unique(target)) == len(target)


def test_dead_units_zip_with_dead_units_of_others():
    """The living ones, however correlated, are left alone."""
    generator = np.random.default_rng(0)
    living = generator.standard_normal((50, 1)) + 0.5 * generator.standard_normal((50, 4))
    one = np.concatenate([living, np.full((50, 2), 3.0)], axis=1)
    clusters = Clusters(np.concatenate([one, one], axis=1), np.repeat([0, 1], 6))
    clusters.merge(6)
    numbers = clusters.numbers()
    assert numbers[:6].tolist() == numbers[6:].tolist() == list(range(6))


# --- identity oracle ---


@pytest.mark.parametrize("name", ["resnet", "vit", "densenet"])
@pytest.mark.parametrize(
    ("method", "options", "n"),
    [
        ("weight_matching", {}, 2),
        ("weight_matching", {"reference": "mean"}, 3),
        ("activation_matching", {}, 2),
        ("activation_matching", {"reference": "mean"}, 3),
        ("optimal_transport", {}, 2),
        ("optimal_transport", {"variant": "activations"}, 3),
        ("cluster", {}, 3),
        ("partial", {}, 3),
        ("zip", {}, 2),
        ("zip", {"variant": "across"}, 3),
    ],
)
def test_permuted_copies_give_the_network_back(
    name: str, method: str, options: dict[str, object], n: int
):
    graph = analyzed(name)
    states = permuted_copies(graph, n)
    needed = method in CALIBRATED or options.get("variant") == "activations"
    measured = activations(graph, states) if needed else None
    found = dict(activations=measured, **options)
    assert distance_to_the_first(graph, states, method, found) <= 1e-6
    # The oracle sees something: without alignment, the copies are far apart.
    assert distance_to_the_first(graph, states, "average", {}) > 1e-3


def test_aligning_to_another_member_gives_the_network_in_its_order():
    graph = analyzed("resnet")
    states = permuted_copies(graph, 3)
    plan = planned(graph, states, "weight_matching", reference=2)
    fused = fused_tensors(graph, plan, states)
    for name, tensor in fused.items():
        torch.testing.assert_close(tensor, states[2][name])


@pytest.mark.parametrize("variant", [None, "across"])
@pytest.mark.parametrize("n", [2, 4])
def test_zipping_identical_networks_gives_the_network(n: int, variant: str | None):
    graph = analyzed("resnet")
    states = [as_double(graph.program.state())] * n
    options = {"variant": variant, "activations": activations(graph, states)}
    plan = planned(graph, states, "zip", **options)
    for name, tensor in fused_tensors(graph, plan, states).items():
        torch.testing.assert_close(tensor, states[0][name])


class Backwards(nn.Module):
    """Layers whose names are in the opposite order of the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 3), nn.Linear(7, 6), nn.Linear(4, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(self.b(self.c(x).relu()).relu())


def test_transport_goes_from_the_input_on_whatever_the_names(monkeypatch: pytest.MonkeyPatch):
    def never(*args: object) -> None:
        raise AssertionError("a group was compared before those that it reads from")

    module = sys.modules["fxfuse.planning.methods._from_input"]
    monkeypatch.setattr(module, "statistics_distance", never)
    graph = fxfuse.analyze(Backwards().double(), torch.randn(3, 4).double())
    states = permuted_copies(graph, 2)
    assert distance_to_the_first(graph, states, "optimal_transport", {}) <= 1e-6


def test_entropic_transport_is_close_to_exact_where_it_is_weak():
    graph = analyzed("resnet")
    states = permuted_copies(graph, 2)
    weak, strong = (
        distance_to_the_first(graph, states, "optimal_transport", {"regularisation": r})
        for r in (0.01, 1.0)
    )
    assert weak < 1e-3 < strong


# --- transplant: fraction ---


@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("base_member", [0, 2])
def test_a_fraction_of_the_units_comes_from_others(fraction: float, base_member: int):
    members, x = resnets(3), images()
    plan = fxfuse.fuse(
        members,
        x,
        constraints=Constraints(base_member=base_member),
        method=Transplant(fraction=fraction),
    ).plan
    assert plan.options["fraction"] == str(fraction)
    graph = fxfuse.analyze(members[0], x)
    for unit_map in plan.maps:
        taken = unit_map.member != base_member
        assert taken.sum() == fraction * unit_map.n_units
        pairs = set(zip(unit_map.member.tolist(), unit_map.unit.tolist(), strict=True))
        assert (
            len(pairs)
            == unit_map.n_units
            == next(g.n_units for g in graph.groups if g.name == unit_map.group)
        )


def test_the_hosts_best_units_stay():
    members = resnets(2)
    with torch.no_grad():
        members[0].block1.conv1.weight[3:5] *= 100
        members[1].block1.conv1.weight[6:] *= 1000
    unit_map = fxfuse.fuse(members, images(), method=Transplant(fraction=0.75)).plan.map_of(
        "block1.conv1.weight:0"
    )
    assert unit_map.unit[unit_map.member == 0].tolist() == [3, 4]
    assert {6, 7} <= set(unit_map.unit[unit_map.member == 1].tolist())


def test_without_a_fraction_the_host_is_the_network_itself():
    members, x = resnets(2), images()
    state = fxfuse.fuse(members, x, method=Transplant(fraction=0.0)).state_dict()
    own = members[0].state_dict()
    for name in ("stem.weight", "block1.conv2.weight", "bn.running_var"):
        assert torch.equal(state[name], own[name])


# --- bad input ---


@pytest.mark.parametrize(
    ("method", "wrong", "error", "message"),
    [
        ("transplant", {"fraction": 1.5}, OptionError, r"fraction must be in \[0, 1\], got 1.5"),
        (
            "transplant",
            {"fraction": float("nan")},
            OptionError,
            r"fraction must be in \[0, 1\], got nan",
        ),
        (
            "transplant",
            {"fraction": 0.5, "variant": "iterative"},
            OptionError,
            "fraction and variant",
        ),
        (
            "transplant",
            {"fraction": 0.5, "base_member": 2},
            OptionError,
            "base_member must be 0 to 1, got 2",
        ),
        (
            "weight_matching",
            {"reference": 2},
            OptionError,
            "reference must be 0 to 1 or 'mean', got 2",
        ),
        (
            "weight_matching",
            {"reference": -1},
            OptionError,
            "reference must be 0 to 1 or 'mean', got -1",
        ),
        (
            "weight_matching",
            {"reference": "median"},
            OptionError,
            "reference must be .*, got 'median'",
        ),
        ("optimal_transport", {"reference": "mean"}, OptionError, "reference='mean' does not work"),
        (
            "optimal_transport",
            {"regularisation": 0.0},
            OptionError,
            "regularisation must be above 0 and finite, got 0.0",
        ),
        (
            "optimal_transport",
            {"variant": "features"},
            OptionError,
            "unknown variant 'features'(.|\n)*weights, activations",
        ),
        ("zip", {"variant": "within"}, OptionError, "unknown variant 'within'"),
        ("zip", {}, InputError, "'zip' needs calibration inputs"),
        ("cluster", {}, InputError, "'cluster' needs calibration inputs"),
        ("partial", {}, InputError, "'partial' needs calibration inputs"),
        ("cluster", {"score": "size"}, OptionError, "unknown score 'size'"),
        ("activation_matching", {}, InputError, "'activation_matching' needs calibration inputs"),
        (
            "optimal_transport",
            {"variant": "activations"},
            InputError,
            "'activations' of optimal_transport needs calibration inputs",
        ),
    ],
)
def test_wrong_options_are_named(
    method: str, wrong: dict[str, object], error: type[Exception], message: str
):
    with pytest.raises(error, match=message):
        fxfuse.fuse(resnets(2), images(), **flat(method=method, **wrong))


def test_activations_that_do_not_fit():
    graph, states = lists(2)
    good = activations(graph, states)
    name = graph.groups[1].name
    bad = {
        "do not fit": [good[name][0]],
        "do not fit the members": [good[name][0], good[name][1][:-1]],
        "an activation .* is not finite": [good[name][0], good[name][1] * float("nan")],
    }
    for message, tensors in bad.items():
        options = {"activations": {**good, name: tensors}}
        with pytest.raises(InputError, match=message) as caught:
            planned(graph, states, "zip", **options)
        assert name in caught.value.where


def test_transport_without_pot_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch):
    real = builtins.__import__

    def without_pot(name: str, *args: object, **kwargs: object) -> object:
        if name == "ot":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_pot)
    with pytest.raises(MissingDependencyError, match="POT") as caught:
        fxfuse.fuse(resnets(2), images(), method="optimal_transport")
    assert caught.value.how == 'pip install "fxfuse[ot]"'
