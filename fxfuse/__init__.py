"""fxfuse: a torch.fx compiler pass that fuses trained networks into one."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fxfuse.activations.calibration import Calibration
    from fxfuse.analysis.constraints import Constraints
    from fxfuse.analysis.coupling import CouplingGraph, CouplingGroup, FrozenReason, analyze
    from fxfuse.analysis.label_spaces import Heads
    from fxfuse.analysis.rules import rule
    from fxfuse.api.fuse import fuse
    from fxfuse.api.prune import prune
    from fxfuse.api.result import FusionResult
    from fxfuse.api.saved import load, save
    from fxfuse.api.stages import build, plan
    from fxfuse.ensemble import stack, unstack
    from fxfuse.errors import FxfuseError
    from fxfuse.graph.capture import Program, capture
    from fxfuse.graph.example import Example
    from fxfuse.members.members import Members
    from fxfuse.planning.methods import (
        ActivationMatching,
        Average,
        Cluster,
        Concatenate,
        OptimalTransport,
        Partial,
        Transplant,
        WeightMatching,
        Zip,
    )
    from fxfuse.planning.plan import FusionPlan
    from fxfuse.planning.size import Size
    from fxfuse.refine import (
        Classification,
        Custom,
        Embedding,
        Match,
        MultiLabel,
        NextToken,
        Refit,
        Regression,
        Task,
    )
    from fxfuse.runtime import compile, export_onnx, load_package, package

__version__ = "0.1.0"

#: Public name → the module that has it. Imported at first use: torch takes a second to import.
_PUBLIC = {
    "ActivationMatching": "planning.methods",
    "Average": "planning.methods",
    "Calibration": "activations.calibration",
    "Classification": "refine",
    "Cluster": "planning.methods",
    "Concatenate": "planning.methods",
    "Constraints": "analysis.constraints",
    "CouplingGraph": "analysis.coupling",
    "CouplingGroup": "analysis.coupling",
    "Custom": "refine",
    "Embedding": "refine",
    "Example": "graph.example",
    "FrozenReason": "analysis.coupling",
    "FusionPlan": "planning.plan",
    "FusionResult": "api.result",
    "FxfuseError": "errors",
    "Heads": "analysis.label_spaces",
    "Match": "refine",
    "Members": "members.members",
    "MultiLabel": "refine",
    "NextToken": "refine",
    "OptimalTransport": "planning.methods",
    "Partial": "planning.methods",
    "Program": "graph.capture",
    "Refit": "refine",
    "Regression": "refine",
    "Size": "planning.size",
    "Task": "refine",
    "Transplant": "planning.methods",
    "WeightMatching": "planning.methods",
    "Zip": "planning.methods",
    "analyze": "analysis.coupling",
    "build": "api.stages",
    "capture": "graph.capture",
    "compile": "runtime",
    "export_onnx": "runtime",
    "fuse": "api.fuse",
    "load": "api.saved",
    "load_package": "runtime",
    "package": "runtime",
    "plan": "api.stages",
    "prune": "api.prune",
    "rule": "analysis.rules",
    "save": "api.saved",
    "stack": "ensemble",
    "unstack": "ensemble",
}
#: Packages that are part of the public surface.
_PACKAGES = ("errors", "refine", "verify")

__all__ = [
    "ActivationMatching",
    "Average",
    "Calibration",
    "Classification",
    "Cluster",
    "Concatenate",
    "Constraints",
    "CouplingGraph",
    "CouplingGroup",
    "Custom",
    "Embedding",
    "Example",
    "FrozenReason",
    "FusionPlan",
    "FusionResult",
    "FxfuseError",
    "Heads",
    "Match",
    "Members",
    "MultiLabel",
    "NextToken",
    "OptimalTransport",
    "Partial",
    "Program",
    "Refit",
    "Regression",
    "Size",
    "Task",
    "Transplant",
    "WeightMatching",
    "Zip",
    "analyze",
    "build",
    "capture",
    "compile",
    "export_onnx",
    "fuse",
    "load",
    "load_package",
    "package",
    "plan",
    "prune",
    "rule",
    "save",
    "stack",
    "unstack",
]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(import_module(f"fxfuse.{_PUBLIC[name]}"), name)
    elif name in _PACKAGES:
        value = import_module(f"fxfuse.{name}")
    else:
        raise AttributeError(f"module 'fxfuse' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted((*__all__, *_PACKAGES, "__version__"))
