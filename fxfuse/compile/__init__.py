"""From a fused network to what runs in production: eval passes, torch.compile, packages."""

from fxfuse.compile.backend import fxfuse_backend
from fxfuse.compile.channels_last import ChannelsLast
from fxfuse.compile.compiled import compile
from fxfuse.compile.eval_form import EvalForm, RemoveDropout, inference_copy
from fxfuse.compile.fold import FoldBatchNorm
from fxfuse.compile.inference import Compiled, CompileReport
from fxfuse.compile.onnx import export_onnx
from fxfuse.compile.package import load_package, package
from fxfuse.compile.prepare import apply_passes
from fxfuse.compile.stack_branches import StackBranches

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
