"""Operator rules, one file per family (how to add one: docs/adding-an-operator.md)."""

from fxfuse.rules import (
    contraction,
    creation,
    movement,
    normalisation,
    pointwise,
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
    "movement",
    "normalisation",
    "pointwise",
    "reduction",
    "registered",
    "rule",
    "sampling",
    "selection",
]
