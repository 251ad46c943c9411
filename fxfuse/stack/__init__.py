"""Stacking: an ensemble of N networks as one graph that computes all members, losslessly."""

from fxfuse.stack.build import stack
from fxfuse.stack.members import unstack

__all__ = ["stack", "unstack"]
