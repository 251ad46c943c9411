"""What networks do on calibration inputs: values of nodes, activations of units, targets."""

from fxfuse.calibrate.inputs import Calibration
from fxfuse.calibrate.lane import Lane
from fxfuse.calibrate.obs import obs_selection
from fxfuse.calibrate.target import Targets
from fxfuse.calibrate.units import unit_activations

__all__ = ["Calibration", "Lane", "Targets", "obs_selection", "unit_activations"]
