"""How good answers are: against formulas written by hand, and with intervals that hold."""

from __future__ import annotations

import math

import pytest
import torch

from fxfuse.errors import InputError
from fxfuse.refine import Classification, Embedding, Regression
from fxfuse.refine.quality import Estimate, qualities

N, CLASSES = 300, 4


def answers(seed: int, *shape: int) -> torch.Tensor:
    return 2 * torch.randn(N, CLASSES, *shape, generator=torch.Generator().manual_seed(seed))


def labels(*shape: int) -> torch.Tensor:
    truth = sum(answers(seed, *shape) for seed in range(4))
    assert isinstance(truth, torch.Tensor)
    return truth.argmax(1)


@pytest.mark.parametrize("shape", [(), (5,), (3, 2)])
def test_measures_of_classes(shape: tuple[int, ...]) -> None:
    members, truth = [answers(seed, *shape) for seed in range(3)], labels(*shape)
    found = qualities(Classification(), {"one": members[0]}, members, truth, ensemble="all of them")
    assert list(found) == ["one", "all of them"]

    mean = torch.stack([member.double().softmax(1) for member in members]).mean(0)
    for name, p in (("one", members[0].double().softmax(1)), ("all of them", mean)):
        values = {measure: estimate.value for measure, estimate in found[name].items()}
        right = (p.argmax(1) == truth).double()
        one_hot = torch.nn.functional.one_hot(truth, CLASSES).movedim(-1, 1)
        gaps = 0.0
        for b in range(15):
            inside = (p.amax(1) > b / 15) & (p.amax(1) <= (b + 1) / 15)
            gaps += abs(float((p.amax(1) - right)[inside].sum())) / right.numel()
        assert values["accuracy"] == pytest.approx(100 * float(right.mean()))
        assert values["agreement"] == pytest.approx(
            100 * float((p.argmax(1) == mean.argmax(1)).double().mean())
        )
        kl = (mean * (mean / p).log()).sum(1).mean()
        assert values["distance"] == pytest.approx(float(kl), abs=1e-5)
        nll = -p.gather(1, truth.unsqueeze(1)).log().mean()
        assert values["nll"] == pytest.approx(float(nll), rel=1e-5)
        assert values["brier"] == pytest.approx(float((p - one_hot).square().sum(1).mean()))
        assert values["ece"] == pytest.approx(100 * gaps, abs=1e-3)


def test_equivalent_counts_members() -> None:
    members, truth = [answers(seed) for seed in range(3)], labels()
    said = {f"{i}": member for i, member in enumerate(members)}
    for count in (2, 3):
        p = torch.stack([member.softmax(1) for member in members[:count]]).mean(0)
        said[f"first {count}"] = p.log()
    said["nothing"] = torch.zeros(N, CLASSES)
    said["far off"] = 100 * torch.nn.functional.one_hot((truth + 1) % CLASSES, CLASSES).float()
    said["the truth"] = -said["far off"] + 100 * torch.nn.functional.one_hot(truth, CLASSES)
    found = qualities(Classification(), said, members, truth)
    worth = {name: each["equivalent"].value for name, each in found.items()}
    assert max(worth[f"{i}"] for i in range(3)) == pytest.approx(1)
    assert worth["first 3"] == pytest.approx(3)
    assert 1 < worth["first 2"] <= 2
    assert worth["nothing"] == worth["far off"] == 0
    assert worth["the truth"] == 3


def test_intervals_hold_the_truth() -> None:
    """Of many samples, about 95 % have an interval around what all of them together are."""
    held = 0
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        truth = torch.randint(CLASSES, (100,), generator=generator)
        wrong = torch.rand(100, generator=generator) < 0.2
        named = torch.where(wrong, (truth + 1) % CLASSES, truth)
        logits = torch.nn.functional.one_hot(named, CLASSES).float()
        found = qualities(Classification(), {"": logits}, [logits], truth)[""]["accuracy"]
        held += found.low <= 80 <= found.high
    assert 52 <= held <= 60


def test_without_labels_or_classes() -> None:
    members = [answers(0), answers(1)]
    found = qualities(Classification(), {"one": members[0]}, members)["one"]
    assert set(found) == {"distance", "agreement"}
    for task in (Regression(), Embedding()):
        found = qualities(task, {"one": members[0]}, members, labels(), ensemble="both")["one"]
        assert set(found) == {"distance"}
        assert 0 < found["distance"].low < found["distance"].value < found["distance"].high


def test_other_shapes_have_no_ensemble() -> None:
    members, more = [answers(0), answers(1)], torch.randn(N, CLASSES + 1)
    found = qualities(Classification(), {"more": more}, members, labels())["more"]
    assert "distance" not in found
    assert "accuracy" in found


def test_weighted_members() -> None:
    members = [answers(0) / 4, answers(1) / 4]
    task = Classification(weights=(1.0, 0.0))
    found = qualities(task, {"0": members[0], "1": members[1]}, members, labels())
    assert found["0"]["distance"].value == pytest.approx(0, abs=1e-6)
    assert found["0"]["equivalent"].value == pytest.approx(1)
    assert isinstance(found["1"]["distance"], Estimate)
    assert all(math.isfinite(each.value) for each in found["1"].values())


def test_labels_that_do_not_fit() -> None:
    members = [answers(0), answers(1)]
    for bad in (labels()[:-1], labels() + CLASSES, labels().float()):
        with pytest.raises(InputError, match="label"):
            qualities(Classification(), {"0": members[0]}, members, bad)
