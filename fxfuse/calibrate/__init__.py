"""What networks do on calibration inputs: values of nodes, activations of units, targets."""

from fxfuse.calibrate.components import components
from fxfuse.calibrate.lane import Lane
from fxfuse.calibrate.obs import elimination
from fxfuse.calibrate.shelf import MEMORY
from fxfuse.calibrate.target import Targets
from fxfuse.calibrate.units import unit_activations

__all__ = ["MEMORY", "Lane", "Targets", "components", "elimination", "unit_activations"]
