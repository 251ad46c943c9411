"""REPAIR: the fused units' statistics become those of the members' units."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fxfuse
from fxfuse import Heads
from fxfuse.errors import InputError, MemberError, OptionError
from fxfuse.refine import recalibrate, repair

IMAGES = torch.randn(120, 2, 6, 6, generator=torch.Generator().manual_seed(1)) + 0.3


class Plain(nn.Module):
    """No normalisation: two convolutions, one of them transposed, and two linear layers."""

    def __init__(self, seed):
        torch.manual_seed(seed)
        super().__init__()
        self.conv1 = nn.Conv2d(2, 8, 3)
        self.conv2 = nn.ConvTranspose2d(8, 6, 3, padding=2, groups=2, bias=False)
        self.hidden = nn.Linear(24, 10)
        self.head = nn.Linear(10, 3)

    def forward(self, x):
        x = self.conv2(self.conv1(x).relu()).relu()
        return self.head(self.hidden(x.flatten(1)).relu())


class Normalised(nn.Module):
    """A batch normalisation behind a convolution."""

    def __init__(self, seed):
        torch.manual_seed(seed)
        super().__init__()
        self.conv = nn.Conv2d(2, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


def plain(*seeds):
    return [Plain(seed).eval() for seed in seeds]


def outputs_of(module, name, inputs):
    """What a layer of a user's own class gives, channels last: [rows, channels]."""
    found = []
    hook = module.get_submodule(name).register_forward_hook(
        lambda layer, args, y: found.append(y.detach())
    )
    with torch.no_grad():
        module(inputs)
    hook.remove()
    return found[0].movedim(1, -1).flatten(0, -2).double()


def test_units_get_the_interpolated_statistics_of_the_members():
    """Averaged without alignment, each fused unit's target is the members' mean, unit by unit."""
    members = plain(1, 2)
    result = fxfuse.fuse(members, IMAGES[:4], method="average")
    before = outputs_of(result.to_module(), "hidden", IMAGES).std(0)
    report = repair(result, members, IMAGES)
    assert report.layers == ("conv1.weight", "conv2.weight", "hidden.weight")
    assert report.scaled_only == ("conv2.weight",)
    assert report.normalisations == report.left == ()
    own = result.to_module()
    for name in ("conv1", "conv2", "hidden"):
        rows = [outputs_of(member, name, IMAGES) for member in members]
        seen = outputs_of(own, name, IMAGES)
        deviation = torch.stack([r.std(0) for r in rows]).mean(0)
        torch.testing.assert_close(seen.std(0), deviation, rtol=1e-4, atol=1e-6)
        if name != "conv2":
            mean = torch.stack([r.mean(0) for r in rows]).mean(0)
            torch.testing.assert_close(seen.mean(0), mean, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(before, outputs_of(own, "hidden", IMAGES).std(0), rtol=0.05)


def test_a_transplanted_unit_gets_the_statistics_that_it_had():
    members = plain(1, 2)
    result = fxfuse.fuse(members, IMAGES[:4])
    repair(result, members, IMAGES)
    seen = outputs_of(result.to_module(), "hidden", IMAGES)
    (group,) = result.graph.group_of[("hidden.weight", 0)]
    units = result.plan.map_of(group.name)
    index = group.index[("hidden.weight", 0)][:, 0]
    rows = [outputs_of(member, "hidden", IMAGES) for member in members]
    for target, member, unit in zip(units.target, units.member, units.unit, strict=True):
        wanted = rows[member][:, index[unit]]
        got = seen[:, index[target]]
        torch.testing.assert_close(got.mean(), wanted.mean(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got.std(), wanted.std(), rtol=1e-4, atol=1e-6)


def test_identical_members_stay_as_they_are():
    members = plain(1, 1)
    result = fxfuse.fuse(members, IMAGES[:4], method="average")
    repair(result, members, IMAGES)
    with torch.no_grad():
        torch.testing.assert_close(result.module(IMAGES), members[0](IMAGES), rtol=1e-4, atol=1e-5)


def test_with_batch_normalisation_it_is_recalibration():
    members = [Normalised(seed).eval() for seed in (1, 2)]
    result = fxfuse.fuse(members, IMAGES[:4])
    expected = copy.deepcopy(result.module)
    recalibrate(expected, IMAGES)
    report = repair(result, members, IMAGES)
    assert (report.layers, report.left) == ((), ("conv.weight",))
    assert report.normalisations == ("norm.running_mean",)
    torch.testing.assert_close(
        dict(result.module.state_dict()), dict(expected.state_dict()), rtol=1e-5, atol=1e-6
    )


def test_a_dead_unit_is_left_dead():
    members = plain(1, 2)
    for member in members:
        member.hidden.weight.data[3] = 0
    result = fxfuse.fuse(members, IMAGES[:4], method="average")
    repair(result, members, IMAGES)
    assert all(bool(t.isfinite().all()) for t in result.module.state_dict().values())
    assert not result.module.get_parameter("hidden.weight")[3].any()


def test_other_members_or_inputs_are_refused():
    members = plain(1, 2)
    result = fxfuse.fuse(members, IMAGES[:4])
    with pytest.raises(MemberError, match="2 members were fused, got 1"):
        repair(result, members[:1], IMAGES)
    with pytest.raises(InputError, match="the wrong shape"):
        repair(result, members, IMAGES[:, :1])


def test_several_heads_are_refused():
    members = plain(1, 2)
    result = fxfuse.fuse(members, IMAGES[:4], heads=Heads(["head"]))
    with pytest.raises(OptionError, match="several heads cannot be repaired"):
        repair(result, members, IMAGES)
