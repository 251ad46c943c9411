"""Refine a fused network by gradient descent: fine-tuning on labels, distillation without them."""

from fxfuse.refine.loop import RefineReport
from fxfuse.refine.train import default_optimizer, distill, finetune

__all__ = ["RefineReport", "default_optimizer", "distill", "finetune"]
