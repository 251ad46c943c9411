"""fxfuse: a torch.fx compiler pass that fuses trained networks into one."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fxfuse.capture import Captured, capture
    from fxfuse.compile import compile, export_onnx, load_package, package
    from fxfuse.coupling import CouplingGraph, CouplingGroup, FrozenReason, analyze
    from fxfuse.errors import FxfuseError
    from fxfuse.fuse import fuse
    from fxfuse.plan import FusionPlan
    from fxfuse.prune import prune
    from fxfuse.result import FusionResult
    from fxfuse.rules import rule
    from fxfuse.saved import load, save
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
    "load",
    "load_package",
    "package",
    "prune",
    "rule",
    "save",
    "stack",
    "unstack",
]
__version__ = "0.1.0"

#: Name → the file that it is in. Imported when it is first asked for: torch takes a second.
_HOMES = {
    "Captured": "capture",
    "CouplingGraph": "coupling",
    "CouplingGroup": "coupling",
    "FrozenReason": "coupling",
    "FusionPlan": "plan",
    "FusionResult": "result",
    "FxfuseError": "errors",
    "analyze": "coupling",
    "capture": "capture",
    "compile": "compile",
    "export_onnx": "compile",
    "fuse": "fuse",
    "load": "saved",
    "load_package": "compile",
    "package": "compile",
    "prune": "prune",
    "rule": "rules",
    "save": "saved",
    "stack": "stack",
    "unstack": "stack",
}


class _Package(ModuleType):
    """This package: `fxfuse.fuse` is the function, not the file of that name."""

    def __setattr__(self, name: str, value: Any) -> None:
        # Importing a file makes it an attribute of its package.
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(import_module(f"fxfuse.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    missing = AttributeError(f"module 'fxfuse' has no attribute {name!r}")
    if name.startswith("_"):
        raise missing
    try:
        return import_module(f"fxfuse.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"fxfuse.{name}":
            raise
        raise missing from None


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
