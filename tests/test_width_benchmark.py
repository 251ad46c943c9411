"""The benchmark of accuracy against cost, and the page that is made of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.paper.networks import VGG
from benchmarks.width import (
    ENSEMBLE,
    MATCHED,
    MEMBER,
    MEMBER_MATCHED,
    PRUNED,
    PRUNED_MATCHED,
    REFITTED,
    Teacher,
    pruned,
)
from benchmarks.width_table import blocks_of, figures_of, page


def case(setting: str, seed: int, accuracies: dict[tuple[str, float], float]) -> dict[str, Any]:
    rows = [
        {"row": row, "width": width, "accuracy": value, "parameters": 100, "flops": 200}
        for (row, width), value in accuracies.items()
    ]
    about = {"network": "vgg", "data": "mnist1d", "setting": setting, "n": 2, "seed": seed}
    keys = ("torch", "torch-pruning", "python", "device", "machine", "threads", "commit")
    return {**about, "conditions": dict.fromkeys(keys, "-"), "rows": rows}


def results(**changed: float) -> dict[str, Any]:
    """Two seeds in both settings; all figures are reached unless something is changed."""
    values = {(MEMBER, 1.0): 80.0, (MEMBER_MATCHED, 1.0): 81.0, (ENSEMBLE, 2.0): 90.0}
    values |= {(PRUNED, 0.75): 20.0, (PRUNED_MATCHED, 0.75): changed.get("pruned", 70.0)}
    for width in (0.75, 1.0, 1.25, 1.5, 2.0):
        values |= {(REFITTED, width): 85.0, (MATCHED, width): changed.get("matched", 90.0)}
    settings = ("same data", "specialists")
    cases = [case(setting, seed, values) for setting in settings for seed in range(2)]
    return {"steps": 160, "batch": 64, "calibration": 1000, "cases": cases}


@pytest.mark.parametrize(
    ("changed", "missed"),
    [
        ({}, set()),
        ({"matched": 89.9}, {"width 1.25 at the ensemble"}),
        ({"pruned": 91.0}, {"width 0.75 at or ahead of the pruned member, matched as long"}),
    ],
)
def test_figures_are_judged_by_the_means(changed: dict[str, float], missed: set[str]):
    told = results(**changed)
    figures = list(figures_of(blocks_of(told)))
    assert len(figures) == 6
    assert {f.what for f in figures if not f.reached} == missed
    reached = sum(f.reached for f in figures)
    assert f"{reached} of 6 are" in page(told)


def test_the_page_has_every_width_of_every_block():
    text = page(results())
    assert text.count("## vgg on mnist1d") == 2
    assert text.count("| 0.75 | 1.00 | 1.00 | 85.0 [85.0, 85.0] |") == 2
    assert "2 seeds; best member 80.0 [80.0, 80.0]" in text


def test_the_control_is_as_narrow_as_it_is_asked_to_be():
    member = VGG((1, 16), 10).eval()
    narrow = pruned(member, 0.5, torch.randn(4, 1, 16))
    assert [m.out_channels for m in narrow.modules() if isinstance(m, nn.Conv1d)] == [8, 16, 32, 32]
    assert narrow.head.out_features == 10
    assert member.hidden.out_features == 64


def test_the_teacher_remembers():
    calls = []
    layer = nn.Linear(3, 2)
    layer.register_forward_hook(lambda *_: calls.append(1))
    teacher, x = Teacher(layer), torch.randn(4, 3)
    first, again = teacher(x), teacher(x.clone())
    assert torch.equal(first, again)
    assert len(calls) == 1
    assert not torch.equal(teacher(x + 1), first)
