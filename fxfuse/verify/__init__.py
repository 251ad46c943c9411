"""The oracles: how we know that an analysis and a fusion are right (DESIGN.md section 7)."""

from fxfuse.verify.check import EXACT, Check, Verification, relative_error
from fxfuse.verify.identity import handover, identity
from fxfuse.verify.parity import parity
from fxfuse.verify.permutation import permutation, permutation_of, sensitivity, wrong_groups
from fxfuse.verify.wide import concatenation_equals_ensemble, equals_ensemble, equals_heads

__all__ = [
    "EXACT",
    "Check",
    "Verification",
    "concatenation_equals_ensemble",
    "equals_ensemble",
    "equals_heads",
    "handover",
    "identity",
    "parity",
    "permutation",
    "permutation_of",
    "relative_error",
    "sensitivity",
    "wrong_groups",
]
