"""What tests/forked.py imports before it forks."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import nn

import fxfuse
import fxfuse.cli.app
from fxfuse.cli.commands import analyze, fuse  # noqa: F401

torch.set_num_threads(1)

# What torch imports only when it exports.
_LAYERS = nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)
fxfuse.fuse([nn.Sequential(*_LAYERS), nn.Sequential(*_LAYERS)], torch.ones(2, 2))
