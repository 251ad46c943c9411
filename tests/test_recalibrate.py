"""Recalibration of running statistics, against PyTorch's own pass in train mode."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fxfuse
from fxfuse.errors import FxfuseError, InputError, OptionError
from fxfuse.refine import recalibrate

IMAGES = torch.randn(24, 2, 6, 6, generator=torch.Generator().manual_seed(1)) + 0.5


class Net(nn.Module):
    """Two batch normalisations, the second behind the first, and dropout."""

    def __init__(self, momentum=0.1):
        super().__init__()
        self.conv1 = nn.Conv2d(2, 6, 3)
        self.norm1 = nn.BatchNorm2d(6, momentum=momentum)
        self.conv2 = nn.Conv2d(6, 4, 3)
        self.norm2 = nn.BatchNorm2d(4, affine=False, momentum=momentum)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.norm1(self.conv1(x)).relu()
        return self.head(self.drop(self.norm2(self.conv2(x)).relu().mean((2, 3))))


def net(seed, **options):
    torch.manual_seed(seed)
    return Net(**options).eval()


def statistics(module):
    return {name: t.clone() for name, t in module.state_dict().items() if "running" in name}


def pass_in_train_mode(module, *batches):
    """What PyTorch makes of the running statistics: cumulative averages of batches."""
    module = copy.deepcopy(module).train()
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.reset_running_stats()
            part.momentum = None
    with torch.no_grad():
        for batch in batches:
            module(batch)
    return statistics(module)


def test_equals_a_pass_in_train_mode_without_momentum():
    module = net(0)
    before = {name: t.clone() for name, t in module.state_dict().items()}
    expected = pass_in_train_mode(module, IMAGES)
    assert recalibrate(module, IMAGES) == ("norm1", "norm2")
    torch.testing.assert_close(statistics(module), expected, rtol=1e-5, atol=1e-6)
    after = module.state_dict()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert sorted(changed) == sorted(expected)
    assert not any(part.training for part in module.modules())


def test_a_fused_graph_equals_the_users_own_class():
    members = [net(seed) for seed in (1, 2)]
    result = fxfuse.fuse(members, IMAGES[:4])
    own = result.to_module()
    expected = pass_in_train_mode(own, IMAGES)
    assert recalibrate(result.module, IMAGES) == ("norm1", "norm2")
    torch.testing.assert_close(statistics(result.module), expected, rtol=1e-5, atol=1e-6)
    assert recalibrate(own, IMAGES) == ("norm1", "norm2")
    torch.testing.assert_close(own(IMAGES), result.module(IMAGES))


def test_a_captured_layer_without_momentum_is_recalibrated_too():
    members = [net(seed, momentum=None) for seed in (1, 2)]
    module = fxfuse.fuse(members, IMAGES[:4]).module
    recalibrate(module, IMAGES)
    fresh = copy.deepcopy(module)
    recalibrate(fresh, 3 * IMAGES - 1)
    assert not torch.allclose(module.norm1.running_mean, fresh.norm1.running_mean)


def test_batches_are_pooled_exactly():
    """Mean and unbiased variance over all 24 inputs, where batches of unlike sizes differ."""
    module = net(0)
    recalibrate(module, IMAGES, batch=7)
    seen = module.conv1(IMAGES).transpose(0, 1).flatten(1).double()
    torch.testing.assert_close(module.norm1.running_mean.double(), seen.mean(1))
    torch.testing.assert_close(module.norm1.running_var.double(), seen.var(1))


def test_modes_and_counters_stay():
    module = net(0)
    module.drop.train()
    module.norm1.train()
    modes = [part.training for part in module.modules()]
    recalibrate(module, IMAGES)
    assert [part.training for part in module.modules()] == modes
    assert module.norm1.num_batches_tracked == 0


def test_dropout_is_off():
    """A layer behind dropout sees what it sees in eval mode."""
    module = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(3)).train()
    inputs = torch.rand(50, 3, generator=torch.Generator().manual_seed(0))
    recalibrate(module, inputs)
    torch.testing.assert_close(module[1].running_mean, inputs.mean(0))


def test_a_network_without_batch_normalisation_stays_as_it_is():
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=False))
    assert recalibrate(module, torch.rand(5, 3)) == ()


def test_one_input_tensor_per_argument():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, a, b):
            return self.norm(a + b)

    module, (a, b) = Two(), (torch.rand(9, 3), torch.rand(9, 3))
    recalibrate(module, (a, b), batch=4)
    torch.testing.assert_close(module.norm.running_mean, (a + b).mean(0))


BAD = {
    "one input": (IMAGES[:1], {}, InputError, "at least 2 inputs are needed, got 1"),
    "no tensor": ([[1.0]], {}, InputError, "not tensors"),
    "another shape": (torch.rand(4, 5), {}, InputError, "rejects the inputs"),
    "another dtype": (IMAGES.double(), {}, InputError, "rejects the inputs"),
    "batch of one": (IMAGES, {"batch": 1}, OptionError, "batch must be at least 2, got 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    inputs, options, kind, message = BAD[name]
    with pytest.raises(FxfuseError, match=message) as caught:
        recalibrate(net(0), inputs, **options)
    assert type(caught.value) is kind


def test_activations_that_are_not_finite_name_the_layer_and_change_nothing():
    module = net(0)
    with torch.no_grad():
        module.conv2.weight[1] = float("nan")
    before = statistics(module)
    with pytest.raises(InputError, match="norm2"):
        recalibrate(module, IMAGES)
    torch.testing.assert_close(statistics(module), before, rtol=0, atol=0)
