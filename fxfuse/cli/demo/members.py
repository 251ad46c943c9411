"""The demo's members: trained networks, and their plain average."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn

from fxfuse.cli.data import Batches
from fxfuse.cli.demo.network import SmallResNet
from fxfuse.refine import finetune


def train_member(batches: Batches, steps: int, seed: int) -> nn.Module:
    """Return a network trained from scratch."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        member = SmallResNet()
    optimizer = torch.optim.SGD(member.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    finetune(
        member,
        batches,
        steps=steps,
        optimizer=optimizer,
        scheduler=schedule,
        progress=False,
        seed=seed,
    )
    return member


def average(members: Sequence[nn.Module]) -> nn.Module:
    """Return the plain mean of the members' weights; integer buffers are the first member's."""
    states = [member.state_dict() for member in members]
    mean = {
        name: torch.stack([state[name] for state in states]).mean(dim=0)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in states[0].items()
    }
    average = copy.deepcopy(members[0])
    average.load_state_dict(mean)
    return average
