"""Lowerings: how operators run for all members at once, one file per family."""

from __future__ import annotations

from typing import Any

from fxfuse.analysis.rules.pointwise import is_pointwise
from fxfuse.ensemble.lowerings import (
    attention,
    contraction,
    convolution,
    elementwise,
    lookup,
    movement,
    normalisation,
    window,
)
from fxfuse.ensemble.lowerings.registry import Entry, entry_of, lowering, registered

__all__ = [
    "Entry",
    "attention",
    "contraction",
    "convolution",
    "elementwise",
    "find",
    "lookup",
    "lowering",
    "movement",
    "normalisation",
    "registered",
    "window",
]


def find(target: Any) -> Entry | None:
    """Return the lowering of an operator, or None: it runs member by member."""
    found = entry_of(target)
    if found is None and is_pointwise(target):
        return elementwise.POINTWISE
    return found
