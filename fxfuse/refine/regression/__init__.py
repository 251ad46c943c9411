"""Closed-form, label-free refit of a fused network."""

from fxfuse.refine.regression.refit import refit
from fxfuse.refine.regression.run import LayerFit, RefitReport, Settings, refit_state

__all__ = ["LayerFit", "RefitReport", "Settings", "refit", "refit_state"]
