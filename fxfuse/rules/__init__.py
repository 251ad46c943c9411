"""Operator rules, one file per family (how to add one: docs/adding-an-operator.md)."""

from fxfuse.rules import (
    contraction,
    creation,
    lookup,
    movement,
    normalisation,
    ordering,
    pointwise,
    recurrent,
    reduction,
    sampling,
    selection,
)
from fxfuse.rules.registry import Call, Rule, concrete_shape, find, hint, registered, rule

__all__ = [
    "Call",
    "Rule",
    "concrete_shape",
    "contraction",
    "creation",
    "find",
    "hint",
    "lookup",
    "movement",
    "normalisation",
    "ordering",
    "pointwise",
    "recurrent",
    "reduction",
    "registered",
    "rule",
    "sampling",
    "selection",
]
