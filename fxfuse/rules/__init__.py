"""Operator rules, one file per family (how to add one: docs/how-to/add-an-operator.md).

All that a rule of one's own needs can be imported from here.
"""

from fxfuse.labels import Field, Kind, Value, positions
from fxfuse.ledger import Ledger
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
from fxfuse.rules.algebra import align, contract, drop, meet, only_unlabelled, reduce_over
from fxfuse.rules.family import rule_file
from fxfuse.rules.registry import Call, Rule, concrete_shape, find, hint, registered, rule
from fxfuse.rules.templates import contracting, elementwise, same_labels

__all__ = [
    "Call",
    "Field",
    "Kind",
    "Ledger",
    "Rule",
    "Value",
    "align",
    "concrete_shape",
    "contract",
    "contracting",
    "contraction",
    "creation",
    "drop",
    "elementwise",
    "find",
    "hint",
    "lookup",
    "meet",
    "movement",
    "normalisation",
    "only_unlabelled",
    "ordering",
    "pointwise",
    "positions",
    "recurrent",
    "reduce_over",
    "reduction",
    "registered",
    "rule",
    "rule_file",
    "same_labels",
    "sampling",
    "selection",
]
