"""General maps: W_fused = Σ_i M_i W_i U_i, against the formula with dense block matrices."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import fxfuse
from fxfuse import Constraints
from fxfuse.analysis.coupling import CouplingGraph
from fxfuse.analysis.heads import join
from fxfuse.analysis.label_spaces import Heads
from fxfuse.errors import PlanError
from fxfuse.members.fingerprint import digest_of
from fxfuse.planning.plan import FusionPlan, UnitMap
from fxfuse.transform.apply import fused_tensors
from tests.nets import SmallResNet, images
from tests.options import planned


def random_map(name: str, n_units: int, n_members: int, density: float, seed: int) -> UnitMap:
    """A map with random signed entries, listed in random order."""
    generator = np.random.default_rng(seed)
    taken = generator.random((n_units, n_members, n_units)) < density
    entries = generator.permutation(np.argwhere(taken))
    weight, read = generator.standard_normal((2, len(entries)))
    return UnitMap(name, n_units, entries[:, 0], entries[:, 1], entries[:, 2], weight, read)


def matrices(unit_map: UnitMap, n_members: int, slots: int = 1) -> tuple[list, list]:
    """M and U of each member, [n·slots, n·slots]; slots of a unit stand next to each other."""
    shape = (n_members, unit_map.n_units, unit_map.n_units)
    merge, unmerge = torch.zeros(shape).double(), torch.zeros(shape).double()
    for t, i, u, m, r in zip(
        unit_map.target, unit_map.member, unit_map.unit, unit_map.weight, unit_map.read, strict=True
    ):
        merge[i, t, u], unmerge[i, u, t] = m, r
    block = torch.eye(slots).double()
    return [torch.kron(m, block) for m in merge], [torch.kron(u, block) for u in unmerge]


def with_maps(
    members: list[nn.Module], x: torch.Tensor, density: float
) -> tuple[CouplingGraph, FusionPlan, dict[str, torch.Tensor]]:
    program = [fxfuse.capture(m, x) for m in members]
    graph = fxfuse.analyze(program[0])
    states = [c.state() for c in program]
    plan = planned(graph, states, "average")
    maps = tuple(
        random_map(g.name, g.n_units, len(members), density, seed)
        for seed, g in enumerate(graph.groups)
    )
    plan = replace(plan, maps=maps)
    return graph, plan, fused_tensors(graph, plan, states)


def mlp() -> nn.Module:
    layers = [nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 3)]
    return nn.Sequential(*layers).double()


@pytest.mark.parametrize("density", [0.05, 0.5, 1.0])
@pytest.mark.parametrize("n", [2, 3])
def test_an_mlp_with_any_maps(n: int, density: float):
    members = [mlp() for _ in range(n)]
    _, plan, fused = with_maps(members, torch.randn(3, 4).double(), density)
    (m1, u1), (m2, u2) = (matrices(plan.map_of(f"{k}.weight:0"), n) for k in (0, 2))
    expected = {
        "0.weight": sum(m1[i] @ members[i][0].weight for i in range(n)),
        "0.bias": sum(m1[i] @ members[i][0].bias for i in range(n)),
        "2.weight": sum(m2[i] @ members[i][2].weight @ u1[i] for i in range(n)),
        "2.bias": sum(m2[i] @ members[i][2].bias for i in range(n)),
        "4.weight": sum(members[i][4].weight @ u2[i] for i in range(n)) / n,
        "4.bias": sum(members[i][4].bias for i in range(n)) / n,
    }
    for name, tensor in expected.items():
        torch.testing.assert_close(fused[name], tensor.detach())


class Convolutions(nn.Module):
    """Convolutions, a norm, a depthwise convolution, and a linear layer that reads pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 5, 3, padding=1)
        self.norm = nn.BatchNorm2d(5)
        self.deep = nn.Conv2d(5, 5, 3, padding=1, groups=5)
        self.second = nn.Conv2d(5, 4, 3, padding=1)
        self.head = nn.Linear(4 * 16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.deep(self.norm(self.first(x)).relu()).relu()
        return self.head(self.second(x).relu().flatten(1))


@pytest.mark.parametrize("density", [0.15, 0.8])
def test_a_cnn_with_any_maps(density: float):
    members = [Convolutions().double() for _ in range(2)]
    for member in members:
        nn.init.normal_(member.norm.weight)
        nn.init.normal_(member.norm.running_mean)
    _, plan, fused = with_maps(members, torch.randn(3, 3, 4, 4).double(), density)
    m1, u1 = matrices(plan.map_of("first.weight:0"), 2)
    second = plan.map_of("second.weight:0")
    (m2, _), (_, pixels) = matrices(second, 2), matrices(second, 2, slots=16)

    def rows(m: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.tensordot(m, w.detach(), 1)

    pairs = list(zip(members, m1, u1, m2, pixels, strict=True))
    expected = {
        "first.weight": sum(rows(m, a.first.weight) for a, m, *_ in pairs),
        "norm.weight": sum(rows(m, a.norm.weight) for a, m, *_ in pairs),
        "norm.running_mean": sum(rows(m, a.norm.running_mean) for a, m, *_ in pairs),
        "deep.weight": sum(rows(m, a.deep.weight) for a, m, *_ in pairs),
        "second.weight": sum(
            torch.einsum("ab,bcxy,cd->adxy", m2, a.second.weight.detach(), u1)
            for a, _, u1, m2, _ in pairs
        ),
        "head.weight": sum(a.head.weight.detach() @ u for a, *_, u in pairs) / 2,
    }
    for name, tensor in expected.items():
        torch.testing.assert_close(fused[name], tensor)
    # Integers are constants of the network: the base member's.
    assert fused["norm.num_batches_tracked"].dtype is torch.int64


def test_half_precision_sums_in_float32():
    members = [mlp().to(torch.bfloat16) for _ in range(2)]
    _, plan, fused = with_maps(members, torch.randn(3, 4, dtype=torch.bfloat16), 1.0)
    m1, _ = matrices(plan.map_of("0.weight:0"), 2)
    expected = sum(m1[i].float() @ members[i][0].weight.float() for i in range(2))
    assert fused["0.weight"].dtype is torch.bfloat16
    torch.testing.assert_close(fused["0.weight"], expected.detach().bfloat16())


def test_complex_weights_take_any_maps():
    layers = [(4, 7), (7, 6), (6, 3)]
    members = [
        nn.Sequential(*(nn.Linear(a, b, dtype=torch.complex128) for a, b in layers))
        for _ in range(2)
    ]
    _, plan, fused = with_maps(members, torch.randn(3, 4, dtype=torch.complex128), 0.5)
    (_, u1), (m2, _) = (matrices(plan.map_of(f"{k}.weight:0"), 2) for k in (0, 1))
    expected = sum(
        m2[i].to(torch.complex128) @ members[i][1].weight.detach() @ u1[i].to(torch.complex128)
        for i in range(2)
    )
    torch.testing.assert_close(fused["1.weight"], expected)


def test_a_tied_weight_has_one_map_and_the_output_the_mean():
    """Embedding and head are one tensor: its rows are classes, and the members' mean."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(5, 6)
            self.inner = nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(self.words(x)).relu() @ self.words.weight.T

    members = [Tied().double(), Tied().double()]
    x = torch.arange(6).reshape(2, 3) % 5
    _, plan, fused = with_maps(members, x, 1.0)
    _, u = matrices(plan.map_of("words.weight:1"), 2)
    expected = sum(members[i].words.weight.detach() @ u[i] for i in range(2)) / 2
    torch.testing.assert_close(fused["words.weight"], expected)


def test_a_weight_used_both_ways_inside_is_written_along_its_first_dimension():
    """It writes and reads along both: M once, and U once, as in the formula."""

    class BothWays(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.up, self.head = nn.Linear(4, 5), nn.Linear(5, 6), nn.Linear(5, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.up(self.first(x).relu()).relu()
            return self.head((h @ self.up.weight).relu())

    members = [BothWays().double(), BothWays().double()]
    graph, plan, fused = with_maps(members, torch.randn(3, 4).double(), 0.8)
    assert {("up.weight", 0), ("up.weight", 1)} <= graph.readers & graph.writers
    merge, _ = matrices(plan.map_of("up.weight:0"), 2)
    _, unmerge = matrices(plan.map_of("first.weight:0"), 2)
    expected = sum(merge[i] @ members[i].up.weight.detach() @ unmerge[i] for i in range(2))
    torch.testing.assert_close(fused["up.weight"], expected)


def test_rows_that_leave_the_network_are_a_mean_and_the_others_are_not():
    """One weight writes the output and units: 1/N belongs to the rows of the output alone."""

    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Linear(4, 3 + 6), nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            h = self.first(x)
            return h[:, :3], self.head(h[:, 3:].relu())

    members = [Split().double(), Split().double()]
    x = torch.randn(3, 4).double()
    result = fxfuse.fuse(members, x)
    units = result.plan.map_of("first.weight:0")
    weight = result.state_dict()["first.weight"]
    mean = (members[0].first.weight + members[1].first.weight) / 2
    torch.testing.assert_close(weight[:3], mean[:3].detach())
    for place, (i, unit) in enumerate(zip(units.member, units.unit, strict=True)):
        assert torch.equal(weight[3 + place], members[i].first.weight[3 + unit])
    assert fxfuse.verify.concatenation_equals_ensemble(members, x).passed


def test_the_hosts_units_are_no_mean_however_units_are_merged():
    """What reads a part that only the base member has takes the mean of its own units."""

    class PartlyFrozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 6)
            self.head = nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.second(self.first(x).sort(-1).values).relu())

    members = [PartlyFrozen().double(), PartlyFrozen().double()]
    program = [fxfuse.capture(m, torch.randn(3, 4).double()) for m in members]
    graph, states = fxfuse.analyze(program[0]), [c.state() for c in program]
    (group,) = graph.groups
    # Units 0 and 1 of both members are one unit; 2 of both; the others are one member's each.
    target = np.array([0, 0, 0, 0, 1, 1, 2, 3, 4, 5])
    member = np.array([0, 0, 1, 1, 0, 1, 0, 0, 1, 1])
    unit = np.array([0, 1, 0, 1, 2, 2, 3, 4, 3, 4])
    weight = 1.0 / np.bincount(target)[target]
    plan = planned(graph, states, "average")
    plan = replace(plan, maps=(UnitMap(group.name, 6, target, member, unit, weight),))
    fused = fused_tensors(graph, plan, states)["second.weight"]
    own = members[0].second.weight.detach()
    torch.testing.assert_close(fused[0], (own[0] + own[1]) / 2)
    assert torch.equal(fused[1], own[2])
    assert torch.equal(fused[2:4], own[3:5])
    assert not fused[4:].any()


def test_the_mean_in_a_shared_dimension_reads_units_by_their_map():
    members = [mlp(), mlp()]
    program = [fxfuse.capture(m, torch.randn(3, 4).double()) for m in members]
    graph, states = (
        fxfuse.analyze(program[0], constraints=Constraints(share=["2.bias"])),
        [c.state() for c in program],
    )
    (group,) = graph.groups
    plan = planned(graph, states, "average")
    plan = replace(plan, maps=(random_map(group.name, group.n_units, 2, 0.7, 0),))
    _, unmerge = matrices(plan.maps[0], 2)
    expected = sum(m[2].weight.detach() @ u for m, u in zip(members, unmerge, strict=True)) / 2
    fused = fused_tensors(graph, plan, states)
    torch.testing.assert_close(fused["2.weight"], expected)
    assert not (plan.maps[0].weight == 1).any()


class Outer(nn.Module):
    """A table that two groups write side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(4, 6)
        self.table = nn.Parameter(torch.randn(5, 6))
        self.head = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)[:, :, None] * self.second(x)[:, None] + self.table
        return self.head(h.relu().mean(2))


def test_the_shares_of_members_in_a_table_of_two_groups_sum_to_one():
    member = Outer().double()
    program = fxfuse.capture(member, torch.randn(3, 4).double())
    graph = fxfuse.analyze(program)
    assert {len(graph.group_of.get(("table", d), ())) for d in (0, 1)} == {1}
    states = [program.state()] * 2
    plan = planned(graph, states, "average")
    torch.testing.assert_close(fused_tensors(graph, plan, states)["table"], states[0]["table"])
    # Units 0 and 1 of both members are one unit, in both groups.
    maps = []
    for group in graph.groups:
        unit = np.tile(np.arange(group.n_units), 2)
        target = np.maximum(unit - 1, 0)
        weight = 1.0 / np.bincount(target)[target]
        who = np.repeat([0, 1], group.n_units)
        maps.append(UnitMap(group.name, group.n_units, target, who, unit, weight))
    table = fused_tensors(graph, replace(plan, maps=tuple(maps)), states)["table"]
    own = states[0]["table"]
    torch.testing.assert_close(table[0, 0], own[:2, :2].mean())
    torch.testing.assert_close(table[1, 0], own[2, :2].mean())
    torch.testing.assert_close(table[0, 2], own[:2, 3].mean())
    torch.testing.assert_close(table[2, 3], own[3, 4])


def test_every_head_reads_its_own_members_units():
    members = [mlp() for _ in range(3)]
    x = torch.randn(3, 4).double()
    joined = join([fxfuse.capture(m, x) for m in members], Heads("4"))
    graph = fxfuse.analyze(joined.program)
    plan = planned(graph, joined.states, "average")
    plan = replace(plan, maps=tuple(random_map(m.group, m.n_units, 3, 0.7, 0) for m in plan.maps))
    fused = fused_tensors(graph, plan, joined.states)
    _, unmerge = matrices(plan.map_of("2.weight:0"), 3)
    for i, member in enumerate(members):
        expected = member[4].weight.detach() @ unmerge[i]
        torch.testing.assert_close(fused[f"heads.{i}.4.weight"], expected)
        assert torch.equal(fused[f"heads.{i}.4.bias"], member[4].bias)


def test_maps_survive_json():
    graph, plan, _ = with_maps([mlp(), mlp()], torch.randn(3, 4).double(), 0.5)
    again = FusionPlan.from_json(plan.to_json())
    for before, after in zip(plan.maps, again.maps, strict=True):
        assert np.array_equal(before.weight, after.weight)
        assert np.array_equal(before.read, after.read)
    assert graph.groups[0].name in again.summary()


def test_a_plan_with_too_few_weights_is_refused():
    _, plan, _ = with_maps([mlp(), mlp()], torch.randn(3, 4).double(), 0.5)
    value = json.loads(plan.to_json())
    value["maps"][0]["read"].pop()
    value["digest"] = digest_of({k: v for k, v in value.items() if k not in ("note", "digest")})
    with pytest.raises(PlanError, match="not a fusion plan"):
        FusionPlan.from_json(json.dumps(value))


def test_one_hot_maps_stay_gathers(monkeypatch: pytest.MonkeyPatch):
    """No matrix is built where every fused unit has one unit of a member."""

    def never(*args: object, **kwargs: object) -> torch.Tensor:
        raise AssertionError("a matrix was built")

    monkeypatch.setattr(torch, "sparse_coo_tensor", never)
    for method in ("transplant", "average", "weight_matching"):
        result = fxfuse.fuse([SmallResNet(), SmallResNet()], images(), method=method)
        assert result.verification.passed
