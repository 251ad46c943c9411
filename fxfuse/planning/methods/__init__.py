"""Fusion methods: members and groups → merge and unmerge maps, one file per method."""

from fxfuse.planning.methods import (
    activation_matching,
    average,
    optimal_transport,
    transplant,
    weight_matching,
    wide,
    zip_it,
)
from fxfuse.planning.methods.registry import Method, find_method, method, methods
from fxfuse.planning.options import Options, State

__all__ = [
    "Method",
    "Options",
    "State",
    "activation_matching",
    "average",
    "find_method",
    "method",
    "methods",
    "optimal_transport",
    "transplant",
    "weight_matching",
    "wide",
    "zip_it",
]
