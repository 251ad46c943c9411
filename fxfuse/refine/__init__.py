"""Refine a fused network by gradient descent: on labels, by distillation, by matching logits."""

from fxfuse.refine.augment import Augment, shift_and_mix
from fxfuse.refine.loop import RefineReport
from fxfuse.refine.match import MatchReport, match
from fxfuse.refine.train import default_optimizer, distill, finetune

__all__ = [
    "Augment",
    "MatchReport",
    "RefineReport",
    "default_optimizer",
    "distill",
    "finetune",
    "match",
    "shift_and_mix",
]
