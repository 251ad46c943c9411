"""Closed-form, label-free refit of a fused network, and of the last layer of any network."""

from fxfuse.refine.regression.last_layer import refit_head
from fxfuse.refine.regression.refit import refit
from fxfuse.refine.regression.run import Refit, RefitReport, refit_state
from fxfuse.refine.regression.work import LayerFit

__all__ = ["LayerFit", "Refit", "RefitReport", "refit", "refit_head", "refit_state"]
