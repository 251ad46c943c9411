"""From a fused network to what runs in production: eval passes, torch.compile, packages."""

from fxfuse.runtime.backend import fxfuse_backend
from fxfuse.runtime.channels_last import ChannelsLast
from fxfuse.runtime.compiled import compile
from fxfuse.runtime.eval_form import EvalForm, RemoveDropout, inference_copy
from fxfuse.runtime.fold import FoldBatchNorm
from fxfuse.runtime.inference import Compiled, CompileReport
from fxfuse.runtime.onnx import export_onnx
from fxfuse.runtime.package import load_package, package
from fxfuse.runtime.prepare import apply_passes
from fxfuse.runtime.stack_branches import StackBranches

__all__ = [
    "ChannelsLast",
    "CompileReport",
    "Compiled",
    "EvalForm",
    "FoldBatchNorm",
    "RemoveDropout",
    "StackBranches",
    "apply_passes",
    "compile",
    "export_onnx",
    "fxfuse_backend",
    "inference_copy",
    "load_package",
    "package",
]
