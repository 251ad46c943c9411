"""A global budget of units, and shares of units by group."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import fxfuse
from fxfuse import Constraints, Size, Transplant
from fxfuse.errors import OptionError
from fxfuse.planning.allocation import best_of_all
from tests.options import flat

FIRST, SECOND = "0.weight:0", "2.weight:0"


def mlp(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    network = nn.Sequential(
        nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)
    )
    with torch.no_grad():
        # Few of the first layer's units matter.
        network[0].weight[3:] *= 0.05
        network[0].bias[3:] *= 0.05
    return network.double()


@pytest.fixture(scope="module")
def members() -> list[fxfuse.Program]:
    return [fxfuse.capture(mlp(seed), torch.randn(4, 5).double()) for seed in range(2)]


def test_the_best_of_all_groups_by_hand():
    # Relative to the means 3 and 1: 8/3, 1/3, 1/3, 2/3 and four times 1.
    values = {"a": np.array([8.0, 1, 1, 2]), "b": np.ones(4)}
    assert best_of_all(values, 4) == {"a": 1, "b": 3}
    assert best_of_all(values, 6) == {"a": 2, "b": 4}
    assert best_of_all(values, 8) == {"a": 4, "b": 4}
    # Never none, whatever the others have.
    assert best_of_all(values, 1) == {"a": 1, "b": 1}
    assert best_of_all({"a": np.zeros(3), "b": np.ones(2)}, 3) == {"a": 1, "b": 2}


def relative(members: list[fxfuse.Program], layer: int) -> torch.Tensor:
    """Score l2 over the group's mean: squares of what writes a unit and of what reads it.

    The output layer holds the 1/N of the mean.
    """
    mean = 1 / len(members) if layer == 2 else 1
    values = torch.cat(
        [
            m.state()[f"{layer}.weight"].square().sum(1)
            + (mean * m.state()[f"{layer + 2}.weight"]).square().sum(0)
            for m in members
        ]
    )
    return values / values.mean()


@pytest.mark.parametrize("width", [0.5, 1.5])
def test_a_global_budget_keeps_the_best_units_of_all(members: list[fxfuse.Program], width: float):
    result = fxfuse.fuse(members, size=Size(width, allocation="global"))
    local = fxfuse.fuse(members, verify=False, size=width)
    assert sum(result.plan.sizes().values()) == sum(local.plan.sizes().values())
    assert result.plan.sizes()[FIRST] < local.plan.sizes()[FIRST]
    assert result.plan.options["allocation"] == "global"
    kept, gone = [], []
    for group, layer, size in ((FIRST, 0, 12), (SECOND, 2, 8)):
        units = result.plan.map_of(group)
        mine = torch.zeros(2 * size, dtype=torch.bool)
        mine[torch.from_numpy(units.member * size + units.unit)] = True
        values = relative(members, layer)
        kept.append(values[mine])
        gone.append(values[~mine])
    assert torch.cat(kept).min() >= torch.cat(gone).max()


def test_pruning_and_parameters_with_a_global_budget(members: list[fxfuse.Program]):
    pruned = fxfuse.prune(members[0], size=Size(0.25, allocation="global"))
    assert sum(pruned.plan.sizes().values()) == 5
    assert min(pruned.plan.sizes().values()) >= 1
    assert pruned.plan.options["allocation"] == "global"
    least = fxfuse.fuse(members, verify=False, size=Size(0.01, allocation="global"))
    assert set(least.plan.sizes().values()) == {1}
    small = fxfuse.fuse(members, size=Size(max_params=90, multiple_of=2, allocation="global"))
    assert sum(p.numel() for p in small.module.parameters()) <= 90
    assert all(size % 2 == 0 for size in small.plan.sizes().values())
    again = fxfuse.build(fxfuse.FusionPlan.from_json(small.plan.to_json()), members)
    assert again.plan.sizes() == small.plan.sizes()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"allocation": "global"}, "allocation='global' needs a size"),
        ({"allocation": "global", "width": {"0.*": 0.5}}, "width for each pattern"),
        ({"allocation": "fair", "width": 0.5}, "uniform, global"),
        (
            {
                "allocation": "global",
                "width": 0.5,
                "score": "obs",
                "calibration": torch.rand(100, 5),
            },
            "score 'obs'",
        ),
        ({"fraction": {"9.*": 0.5}}, "matches nothing"),
        ({"fraction": {"0.*": 1.5}}, r"fraction must be in \[0, 1\], got 1.5"),
        ({"fraction": {"0.*": 0.5, "*.weight": 0.25}}, "two patterns of fraction contradict"),
    ],
)
def test_bad_input(members: list[fxfuse.Program], options: dict[str, object], match: str):
    with pytest.raises(OptionError, match=match):
        fxfuse.fuse(members, **flat(**options))


def test_a_share_for_a_group_leaves_the_others_to_the_score(members: list[fxfuse.Program]):
    by_score = fxfuse.fuse(members, verify=False).plan
    plan = fxfuse.fuse(
        members, constraints=Constraints(base_member=1), method=Transplant(fraction={"0.*": 0.25})
    ).plan
    assert (plan.map_of(FIRST).member == 0).sum() == 3
    for member in range(2):
        mine = np.sort(plan.map_of(FIRST).of_member(member)[1])
        values = relative(members, 0)[12 * member :][:12]
        best = values.argsort(descending=True)[: len(mine)].sort().values
        assert mine.tolist() == best.tolist()
    for own, wanted in zip(
        (plan.map_of(SECOND).member, plan.map_of(SECOND).unit),
        (by_score.map_of(SECOND).member, by_score.map_of(SECOND).unit),
        strict=True,
    ):
        assert np.array_equal(own, wanted)
    assert plan.options["fraction"] == "{'0.*': 0.25}"
