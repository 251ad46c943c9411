"""fxfuse: a torch.fx compiler pass that fuses trained networks into one."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fxfuse.analysis.coupling import CouplingGraph, CouplingGroup, FrozenReason, analyze
    from fxfuse.analysis.rules import rule
    from fxfuse.api.fuse import fuse
    from fxfuse.api.prune import prune
    from fxfuse.api.result import FusionResult
    from fxfuse.api.saved import load, save
    from fxfuse.ensemble import stack, unstack
    from fxfuse.errors import FxfuseError
    from fxfuse.graph.capture import Program, capture
    from fxfuse.planning.plan import FusionPlan
    from fxfuse.runtime import compile, export_onnx, load_package, package

__version__ = "0.1.0"

#: Public name → the module that has it. Imported at first use: torch takes a second to import.
_PUBLIC = {
    "Program": "graph.capture",
    "CouplingGraph": "analysis.coupling",
    "CouplingGroup": "analysis.coupling",
    "FrozenReason": "analysis.coupling",
    "FusionPlan": "planning.plan",
    "FusionResult": "api.result",
    "FxfuseError": "errors",
    "analyze": "analysis.coupling",
    "capture": "graph.capture",
    "compile": "runtime",
    "export_onnx": "runtime",
    "fuse": "api.fuse",
    "load": "api.saved",
    "load_package": "runtime",
    "package": "runtime",
    "prune": "api.prune",
    "rule": "analysis.rules",
    "save": "api.saved",
    "stack": "ensemble",
    "unstack": "ensemble",
}
#: Packages that are part of the public surface.
_PACKAGES = ("errors", "refine", "verify")

__all__ = [
    "CouplingGraph",
    "CouplingGroup",
    "FrozenReason",
    "FusionPlan",
    "FusionResult",
    "FxfuseError",
    "Program",
    "analyze",
    "capture",
    "compile",
    "export_onnx",
    "fuse",
    "load",
    "load_package",
    "package",
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
