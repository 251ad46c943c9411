"""Refine a fused network: on labels, by distillation, by matching logits, by recalibration."""

from fxfuse.refine.augment import Augment, shift_and_mix
from fxfuse.refine.loop import RefineReport
from fxfuse.refine.match import MatchReport, match
from fxfuse.refine.recalibrate import recalibrate
from fxfuse.refine.train import default_optimizer, distill, finetune

__all__ = [
    "Augment",
    "MatchReport",
    "RefineReport",
    "default_optimizer",
    "distill",
    "finetune",
    "match",
    "recalibrate",
    "shift_and_mix",
]
