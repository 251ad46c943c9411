"""Operator rules, one file per family (how to add one: docs/how-to/add-an-operator.md).

All that a rule of one's own needs can be imported from here.
"""

from fxfuse.analysis.coupling_constraints import CouplingConstraints
from fxfuse.analysis.labels import AbstractTensor, DimLabels, Kind, positions
from fxfuse.analysis.rules import (
    contraction,
    creation,
    fourier,
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
from fxfuse.analysis.rules.algebra import align, contract, drop, meet, only_unlabelled, reduce_over
from fxfuse.analysis.rules.family import rule_file
from fxfuse.analysis.rules.registry import Call, Rule, concrete_shape, find, registered, rule
from fxfuse.analysis.rules.templates import contracting, elementwise, same_labels

__all__ = [
    "AbstractTensor",
    "Call",
    "CouplingConstraints",
    "DimLabels",
    "Kind",
    "Rule",
    "align",
    "concrete_shape",
    "contract",
    "contracting",
    "contraction",
    "creation",
    "drop",
    "elementwise",
    "find",
    "fourier",
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
