"""The setting that the benchmarks of benchmarks/paper share."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import scipy.io
import torch

from benchmarks.paper import setting, training
from benchmarks.paper.datasets import TORCHVISION, Data, load
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


def stored(name, root):
    """A data set of torchvision's on disk, as its authors lay it out: 20 images, then 10."""
    pixels = np.random.default_rng(0).integers(0, 256, (30, 3, 32, 32), dtype=np.uint8)
    labels = np.arange(30) % 10
    if name == "svhn":
        for part, of in (("train", slice(20)), ("test", slice(20, 30))):
            # The digit 0 is class 10 in these files.
            content = {
                "X": pixels[of].transpose(2, 3, 1, 0),
                "y": labels[of, None] + 10 * (labels[of, None] == 0),
            }
            scipy.io.savemat(root / f"{part}_32x32.mat", content)
        return pixels, labels
    if name == "cifar10":
        folder, key, batches = (
            "cifar-10-batches-py",
            "labels",
            [f"data_batch_{i}" for i in range(1, 6)],
        )
        meta, names = "batches.meta", "label_names"
        files = {batch: slice(4 * i, 4 * i + 4) for i, batch in enumerate(batches)}
        files["test_batch"] = slice(20, 30)
    else:
        folder, key, meta, names = "cifar-100-python", "fine_labels", "meta", "fine_label_names"
        files = {"train": slice(20), "test": slice(20, 30)}
    (root / folder).mkdir()
    content = {
        file: {"data": pixels[of].reshape(-1, 3072), key: labels[of].tolist()}
        for file, of in files.items()
    }
    for file, held in {**content, meta: {names: [str(i) for i in range(10)]}}.items():
        (root / folder / file).write_bytes(pickle.dumps(held))
    return pixels, labels


@pytest.mark.parametrize("name", TORCHVISION)
def test_data_of_torchvision_is_read_from_disk(name, tmp_path, monkeypatch):
    pixels, labels = stored(name, tmp_path)
    # Torchvision knows the sums of the real files.
    for module in ("cifar", "svhn"):
        monkeypatch.setattr(f"torchvision.datasets.{module}.check_integrity", lambda *_: True)
    made = load(name, tmp_path)
    assert made.labels.tolist() == labels.tolist()
    assert made.official == 10
    scaled = torch.from_numpy(pixels).float() / 255
    known = scaled[:20].transpose(0, 1).flatten(1)
    mean, std = known.mean(1).view(3, 1, 1), known.std(1).view(3, 1, 1)
    torch.testing.assert_close(made.inputs, (scaled - mean) / std)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="no data set"):
        load("imagenet")
    with pytest.raises(ValueError, match="--data-root"):
        load("cifar10")
    with pytest.raises(ValueError, match="no setting"):
        setting.members("mlp", data(), "experts", 2, 0)
