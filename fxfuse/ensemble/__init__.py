"""Stacking: an ensemble of N networks as one graph that computes all members, losslessly."""

from fxfuse.ensemble.build import stack
from fxfuse.ensemble.members import unstack

__all__ = ["stack", "unstack"]
