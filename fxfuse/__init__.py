"""fxfuse: a torch.fx compiler pass that fuses trained networks into one."""

from fxfuse.capture import Captured, capture
from fxfuse.compile import compile, export_onnx, load_package, package
from fxfuse.coupling import CouplingGraph, CouplingGroup, FrozenReason, analyze
from fxfuse.errors import FxfuseError
from fxfuse.fuse import fuse
from fxfuse.plan import FusionPlan
from fxfuse.prune import prune
from fxfuse.result import FusionResult
from fxfuse.rules import rule
from fxfuse.stack import stack, unstack

__all__ = [
    "Captured",
    "CouplingGraph",
    "CouplingGroup",
    "FrozenReason",
    "FusionPlan",
    "FusionResult",
    "FxfuseError",
    "analyze",
    "capture",
    "compile",
    "export_onnx",
    "fuse",
    "load_package",
    "package",
    "prune",
    "rule",
    "stack",
    "unstack",
]
__version__ = "0.1.0"
