"""The examples run, and do what they say."""

from __future__ import annotations

import pytest

from examples.distill_with_trainer import main


@pytest.mark.filterwarnings("ignore")
def test_distilling_with_the_trainer_of_transformers() -> None:
    found = main(steps=100)
    members = max(found["member 0"], found["member 1"])
    assert found["ensemble"] > members + 5
    assert found["fused, distilled"] > members + 5
