"""Refine a fused network: closed-form refit, fine-tuning on labels, distillation without them."""

from fxfuse.refine.loop import RefineReport
from fxfuse.refine.regression import LayerFit, RefitReport, refit
from fxfuse.refine.train import default_optimizer, distill, finetune

__all__ = [
    "LayerFit",
    "RefineReport",
    "RefitReport",
    "default_optimizer",
    "distill",
    "finetune",
    "refit",
]
