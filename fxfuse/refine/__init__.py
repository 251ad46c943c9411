"""Refine a fused network: in closed form, by matching the ensemble, on labels, by distillation."""

from fxfuse.activations.augment import Augment, shift_and_mix
from fxfuse.refine.history import Candidate, History
from fxfuse.refine.loop import RefineReport
from fxfuse.refine.match import Match, MatchReport, match
from fxfuse.refine.recalibrate import recalibrate
from fxfuse.refine.regression import LayerFit, Refit, RefitReport, refit, refit_head
from fxfuse.refine.repair import RepairReport, repair
from fxfuse.refine.task import (
    Classification,
    Custom,
    Embedding,
    MultiLabel,
    NextToken,
    Regression,
    Task,
)
from fxfuse.refine.train import default_optimizer, distill, finetune

__all__ = [
    "Augment",
    "Candidate",
    "Classification",
    "Custom",
    "Embedding",
    "History",
    "LayerFit",
    "Match",
    "MatchReport",
    "MultiLabel",
    "NextToken",
    "RefineReport",
    "Refit",
    "RefitReport",
    "Regression",
    "RepairReport",
    "Task",
    "default_optimizer",
    "distill",
    "finetune",
    "match",
    "recalibrate",
    "refit",
    "refit_head",
    "repair",
    "shift_and_mix",
]
