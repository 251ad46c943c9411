"""The code on the pages of the documentation runs."""

from __future__ import annotations

import re
from pathlib import Path

import torch

PAGES = Path(__file__).parents[1] / "docs"


def run_page(page: str) -> dict[str, object]:
    """Runs all Python blocks of a page, one after the other; returns what they define."""
    blocks = re.findall(r"^```python\n(.*?)^```", (PAGES / page).read_text(), re.M | re.S)
    assert blocks
    names: dict[str, object] = {"__name__": "page"}
    for block in blocks:
        exec(compile(block, page, "exec"), names)
    return names


def test_partial_fusion(capsys):
    """Real digits: after a short fine-tuning, both heads are far above chance."""
    torch.manual_seed(0)
    found = run_page("how-to/partial-fusion.md")
    assert "even or odd: alone" in capsys.readouterr().out
    chance = (0.5, 0.1)
    for alone, tuned, guess in zip(found["alone"], found["tuned"], chance, strict=True):
        assert alone > guess + 0.3
        assert tuned > guess + 0.3
        assert tuned > alone - 0.1
    network = found["network"]
    assert network.get_parameter("heads.1.head.weight").shape == (10, 64)
    assert found["result"].verification.passed
