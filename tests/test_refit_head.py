"""The last layer fitted to an ensemble: near-exact where it can be, and nothing else changes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fxfuse.errors import InputError, MemberError, OptionError
from fxfuse.refine import refit_head


def net(seed, classes=4):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, classes))


def inputs(n=400):
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(1))


def divergence(module, members, x):
    with torch.no_grad():
        wanted = torch.stack([m.eval()(x) for m in members]).mean(0).log_softmax(1)
        answer = module.eval()(x).log_softmax(1)
    return float((wanted.exp() * (wanted - answer)).sum(1).mean())


def test_a_forgotten_head_is_found_again():
    member = net(0)
    student = copy.deepcopy(member)
    nn.init.normal_(student[3].weight)
    nn.init.normal_(student[3].bias)
    forgotten = divergence(student, [member], inputs())
    refit_head(student, [member, copy.deepcopy(member)], inputs(), layer="3", alpha=1e-6)
    fresh = torch.randn(500, 6)
    assert divergence(student, [member], fresh) < 1e-6 < 1e-2 < forgotten


def test_comes_closer_to_the_ensemble_and_changes_only_that_layer():
    members = [net(seed) for seed in range(3)]
    student = copy.deepcopy(members[0]).train()
    before, far = copy.deepcopy(student.state_dict()), divergence(members[0], members, inputs())
    refit_head(student, members, inputs(), layer="3")
    assert student.training
    changed = {n for n, t in student.state_dict().items() if not torch.equal(t, before[n])}
    assert changed == {"3.weight", "3.bias"}
    assert divergence(student, members, inputs()) < far
    assert not student[3]._forward_hooks


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("1", "has a BatchNorm1d there"),
        ("0", "'0' is not the network's output"),
        ("head", "no such module"),
        ("", "has a Sequential there"),
    ],
)
def test_what_is_no_last_linear_layer_is_refused(layer, message):
    member, student = net(0), net(1)
    before = copy.deepcopy(student.state_dict())
    with pytest.raises(OptionError, match=message):
        refit_head(student, [member], inputs(), layer=layer)
    assert all(torch.equal(t, before[n]) for n, t in student.state_dict().items())


def test_bad_members_and_inputs_are_refused():
    student = net(1)
    with pytest.raises(MemberError, match="its own members"):
        refit_head(student, [student], inputs(), layer="3")
    with pytest.raises(MemberError, match="no members"):
        refit_head(student, [], inputs(), layer="3")
    with pytest.raises(InputError, match="the network rejects"):
        refit_head(student, [net(0)], torch.rand(200, 5), layer="3")
    with pytest.raises(MemberError, match="other classes"):
        refit_head(student, [net(0, classes=5)], inputs(), layer="3")
