"""The task: what the output of a network means."""

from __future__ import annotations

from dataclasses import dataclass

from fxfuse.common.options import Options


class Task(Options):
    """What the output of a network means, and so how far a network is from its ensemble."""


@dataclass(frozen=True)
class Classification(Task):
    """The output is class logits [b, k], of which only differences count: KL divergence."""


@dataclass(frozen=True)
class Regression(Task):
    """The output is values, each of which counts as it is: squared error."""
