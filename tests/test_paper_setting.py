"""The setting that the benchmarks of benchmarks/paper share."""

from __future__ import annotations

import pytest
import torch

from benchmarks.paper import setting, training
from benchmarks.paper.datasets import Data, load
from benchmarks.paper.networks import NETWORKS


def data(official=0):
    """Ten classes of 30 small images each."""
    labels = torch.arange(10).repeat(30)
    inputs = torch.randn(300, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return Data("noise", inputs + labels.reshape(-1, 1, 1, 1), labels, official)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "fxfuse-bench"


@pytest.mark.parametrize("shape", [(1, 40), (1, 28, 28), (3, 32, 32)])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_take_signals_and_images_at_any_width(name, shape):
    for width in (0.5, 1.0, 2.0):
        module = NETWORKS[name](shape, 10, width)
        assert module(torch.rand(2, *shape)).shape == (2, 10)


def test_members_are_trained_once(cache, monkeypatch):
    first = setting.members("mlp", data(), "same data", 2, seed=0, steps=3)
    assert len(list(cache.iterdir())) == 2
    monkeypatch.setattr(training, "_train", None)
    second = setting.members("mlp", data(), "same data", 2, seed=0, steps=3)
    for one, two in zip(first, second, strict=True):
        assert not two.training
        for name, tensor in one.state_dict().items():
            assert torch.equal(tensor, two.state_dict()[name])
    assert not torch.equal(first[0].head.weight, first[1].head.weight)


def test_what_decides_a_member_decides_its_file(cache):
    setting.members("mlp", data(), "same data", 1, seed=0, steps=3)
    setting.members("mlp", data(), "same data", 1, seed=0, steps=4)
    setting.members("mlp", data(), "same data", 1, seed=1, steps=3)
    setting.members("mlp", data(), "specialists", 2, seed=0, steps=3)
    assert len(list(cache.iterdir())) == 5


def test_specialists_see_their_classes_and_a_tenth_of_the_others():
    made = data()
    parts = made.split(0)
    seen = setting.seen(made, parts, "specialists", 4, 1, seed=0)
    counts = made.labels[seen].bincount().tolist()
    whole = made.labels[parts.train].bincount().tolist()
    for label in range(10):
        share = 1.0 if label in (1, 5, 9) else 0.1
        assert counts[label] == round(share * whole[label])


def test_an_official_test_part_stays_the_test_part():
    parts = data(official=100).split(3)
    assert parts.test.tolist() == list(range(200, 300))
    assert sorted(torch.cat([parts.train, parts.val]).tolist()) == list(range(200))
    assert len(parts.train) == 160


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="no data set"):
        load("imagenet")
    with pytest.raises(ValueError, match="--data-root"):
        load("cifar10")
    with pytest.raises(ValueError, match="no setting"):
        setting.members("mlp", data(), "experts", 2, 0)
