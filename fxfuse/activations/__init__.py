"""What networks do on calibration inputs: values of nodes, activations of units."""

from fxfuse.activations.components import components
from fxfuse.activations.elimination import elimination
from fxfuse.activations.node_runner import NodeRunner
from fxfuse.activations.spill_store import MEMORY
from fxfuse.activations.units import unit_activations

__all__ = ["MEMORY", "NodeRunner", "components", "elimination", "unit_activations"]
