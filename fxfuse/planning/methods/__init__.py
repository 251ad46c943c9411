"""Fusion methods: members and groups → merge and unmerge maps, one file per method."""

from fxfuse.planning.context import Context, State
from fxfuse.planning.methods.activation_matching import ActivationMatching
from fxfuse.planning.methods.average import Average
from fxfuse.planning.methods.cluster import Cluster
from fxfuse.planning.methods.concatenate import Concatenate
from fxfuse.planning.methods.optimal_transport import OptimalTransport
from fxfuse.planning.methods.partial import Partial
from fxfuse.planning.methods.registry import Method, find_method, method, methods
from fxfuse.planning.methods.transplant import Transplant
from fxfuse.planning.methods.weight_matching import WeightMatching
from fxfuse.planning.methods.zip_it import Zip

__all__ = [
    "ActivationMatching",
    "Average",
    "Cluster",
    "Concatenate",
    "Context",
    "Method",
    "OptimalTransport",
    "Partial",
    "State",
    "Transplant",
    "WeightMatching",
    "Zip",
    "find_method",
    "method",
    "methods",
]
