"""Fusion methods: members and groups → merge and unmerge maps, one file per method."""

from fxfuse.methods import average, transplant, wide
from fxfuse.methods.registry import Method, Options, State, find_method, method, methods

__all__ = [
    "Method",
    "Options",
    "State",
    "average",
    "find_method",
    "method",
    "methods",
    "transplant",
    "wide",
]
