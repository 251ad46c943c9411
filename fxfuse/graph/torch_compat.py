"""All use of private or unstable torch API: what, why, and what would replace it.

Nothing else in fxfuse names a private attribute of torch (tests/test_torch_compat.py). Tested on
torch 2.13.0 and 2.14.1; `.ci/oldest` runs the tests on the older one.
"""

from __future__ import annotations

import copy
import linecache
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import fx, nn

# Fake tensors carry shape, dtype and aliasing without memory. torch.export leaves them in
# `node.meta["val"]`, but their classes are in a private module. `FakeTensorProp` is public and
# needs a mode all the same. Replaced by: an export of these names from `torch.fx` or `torch.func`.
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)

# Traces a function below autograd with composite operators kept (`pre_dispatch`); `torch.export`
# does it for whole modules only. Replaced by: `make_fx` outside of `experimental`.
from torch.fx.experimental.proxy_tensor import make_fx

# `optimization_hint` is public in an experimental module; `free_unbacked_symbols` is no part of its
# `__all__`. It tells sizes that depend on data. Replaced by: a public test for unbacked sizes.
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols, optimization_hint

# How a graph takes and returns nested values. Replaced by: see `signature_of`.
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo

# Where the code of graph modules lies. Replaced by: see `forget_code`.
from torch.fx.graph_module import _loader

# The common base of torch's batch and instance norms, and of its convolutions: a class of the
# user's may extend it directly. Replaced by: public base classes.
from torch.nn.modules.batchnorm import _NormBase as NormBase
from torch.nn.modules.conv import _ConvNd as ConvNd
from torch.optim.swa_utils import AveragedModel

# Nested inputs and outputs exactly as `torch.export` flattens them: every other library has another
# idea of what is a leaf. Replaced by: the same functions under a public name.
from torch.utils import _pytree as pytree

__all__ = [
    "ConvNd",
    "DataDependentOutputException",
    "DynamicOutputShapeException",
    "FakeTensor",
    "FakeTensorMode",
    "NormBase",
    "argument_names",
    "compile_with_inductor",
    "copy_inputs",
    "copy_origin",
    "copy_signature",
    "flatten_inputs",
    "forget_code",
    "forget_sizes",
    "free_unbacked_symbols",
    "freezing",
    "hint",
    "inductor_modes",
    "inductor_settings",
    "is_operator",
    "is_region",
    "load_package",
    "lookup_backend",
    "make_fx",
    "original_module",
    "output_spec",
    "overloads_of",
    "own_tensors",
    "pytree",
    "registered_operators",
    "schema_of",
    "set_signature",
    "signature_of",
    "write_package",
]

#: Stands for a size that depends on the data, of which nothing is known.
_SOME = 3


_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)


def hint(size: Any) -> Any:
    """Return the number behind a symbolic number; anything else unchanged."""
    if isinstance(size, torch.SymInt):
        return optimization_hint(size, fallback=_SOME)
    if isinstance(size, torch.SymFloat | torch.SymBool):
        # Public functions take sizes only. Replaced by: `optimization_hint` for these, too.
        node = size.node
        return node.pytype(_SOME) if node.hint is None else node.hint
    return size


def schema_of(target: Any) -> Any:
    """Return the schema of an operator: its name, arguments and results; None for other functions.

    Every pass over ATen graphs in torch reads this attribute. Replaced by: a public accessor of
    `torch.ops` operators.
    """
    return getattr(target, "_schema", None)


def argument_names(target: Any) -> list[str]:
    """Return the names of an operator's arguments, in the order of its schema."""
    return [argument.name for argument in target._schema.arguments]


def overloads_of(target: Any) -> Sequence[Any]:
    """Return what is in a graph for an operator that a user names.

    The classes of operators, and the way from a `torch.library.custom_op` to its operator, are
    private. Replaced by: public classes, and `CustomOpDef.default`.
    """
    if isinstance(target, torch.library.CustomOpDef):  # type: ignore[attr-defined]
        return [target._opoverload]
    if isinstance(target, torch._ops.OpOverloadPacket):
        return [getattr(target, name) for name in target.overloads()]
    return [target]


def is_operator(target: Any) -> bool:
    """Tell whether this is one overload of an operator, `torch.ops.aten.add.Tensor`."""
    return isinstance(target, torch._ops.OpOverload)


def registered_operators() -> Sequence[str]:
    """Return the names of all operators of the dispatcher, such as "aten::add.Tensor".

    TorchScript has more, `aten::save` among them, which writes files: attributes of `torch.ops`
    lead to these, too. Replaced by: a public list.
    """
    names: Sequence[str] = torch._C._dispatch_get_all_op_names()
    return names


def is_region(target: Any) -> bool:
    """Tell whether this is an operator whose body is a graph of its own, such as `torch.cond`."""
    return isinstance(target, torch._ops.HigherOrderOperator)


def copy_signature(source: fx.Graph, target: fx.Graph) -> None:
    """Let a graph take and return what another one does: names, nested inputs and outputs.

    `Graph.set_codegen` is public; there is no public way to read what it sets. Replaced by: one.
    """
    target.set_codegen(source._codegen)


def output_spec(graph: fx.Graph) -> Any:
    """How the flattened outputs of a captured graph are put together; None: they are not flat."""
    info = getattr(graph._codegen, "pytree_info", None)
    return None if info is None else info.out_spec


def signature_of(graph: fx.Graph) -> tuple[list[str], Any, Any]:
    """Return the names of the inputs of a captured graph, and the structures of inputs and outputs.

    `Graph.set_codegen` is public; what it sets, and how it is read, is not. Replaced by: a class of
    signatures.
    """
    info = graph._codegen.pytree_info  # type: ignore[attr-defined]
    return list(info.orig_args), info.in_spec, info.out_spec


def set_signature(graph: fx.Graph, names: list[str], inputs: Any, outputs: Any) -> None:
    """Set what `signature_of` returns."""
    graph.set_codegen(_PyTreeCodeGen(_PyTreeInfo(names, inputs, outputs)))


def copy_inputs(source: fx.Graph, target: fx.Graph, spec: Any) -> None:
    """As `copy_signature`, for flattened outputs that are put together as `spec` says."""
    codegen: Any = copy.copy(source._codegen)
    codegen.pytree_info = codegen.pytree_info._replace(out_spec=spec)
    target.set_codegen(codegen)


def flatten_inputs(graph: fx.Graph, values: Sequence[Any]) -> Sequence[Any]:
    """Flatten the inputs of a graph's placeholders as the module's generated code does.

    `Graph.process_inputs` is public, and ignores the order of keys in dictionaries. Replaced by:
    its keyword arguments.
    """
    # Here, where it is needed: it is private beside the other one, and needed once.
    from torch.fx._pytree import tree_flatten_spec

    info = getattr(graph._codegen, "pytree_info", None)
    if info is None:
        return values
    positional = info.in_spec.child(0).num_children
    named = dict(zip(info.orig_args[positional:], values[positional:], strict=True))
    return tree_flatten_spec((list(values[:positional]), named), info.in_spec)


def forget_sizes(program: torch.export.ExportedProgram) -> None:
    """Let go of what torch keeps of the symbolic sizes of an export, once it is done.

    The shape environment holds fake tensors, for guards that are made by now, and these hold the
    environment in C++, where no garbage collector sees the circle; and memoised methods of its
    class hold it as well. So each export would stay for ever. Replaced by: a `torch.export` that
    does it.
    """
    modes = {id(v.fake_mode): v.fake_mode for v in _fakes_of(program)}
    for shapes in (mode.shape_env for mode in modes.values() if mode.shape_env is not None):
        shapes.tracked_fakes = []
        shapes.fake_tensor_cache.clear()
        for method in vars(type(shapes)).values():
            if hasattr(method, "cache_clear"):
                method.cache_clear()


def forget_code() -> None:
    """Let go of the Python code of graph modules that are gone: torch keeps it for tracebacks.

    Of a large network each fusion would leave megabytes. Replaced by: a cache that a module's end
    empties.
    """
    alive, waiting = set[str](), [fx.GraphModule]
    while waiting:
        kind = waiting.pop()
        waiting += kind.__subclasses__()
        # Each graph module has a class of its own, which holds its code.
        code = getattr(vars(kind).get("forward"), "__code__", None)
        alive.add(getattr(code, "co_filename", ""))
    for name in set(_loader.eval_cache) - alive:
        _loader.eval_cache.pop(name, None)
        linecache.cache.pop(name, None)


def _fakes_of(program: torch.export.ExportedProgram) -> Sequence[Any]:
    values = pytree.tree_leaves([node.meta.get("val") for node in program.graph.nodes])
    return [value for value in values if isinstance(value, FakeTensor)]


def original_module(module: nn.Module) -> nn.Module:
    """Return the network in what wraps it for training or speed; else the module itself.

    Wrappers are `torch.compile`, the data parallel ones and `AveragedModel`. All but the first say
    in public what they wrap.
    """
    inner: Any = getattr(module, "module" if isinstance(module, _WRAPPERS) else "_orig_mod", None)
    return original_module(inner) if isinstance(inner, nn.Module) else module


def own_tensors(module: nn.Module) -> Sequence[dict[str, Any]]:
    """Return where a module itself keeps its parameters and its buffers.

    Replaced by: an official way to put back the objects that were there.
    """
    held: Sequence[Any] = (module._parameters, module._buffers)
    # Those of TorchScript lie in C++.
    return [each for each in held if isinstance(each, dict)]


def copy_origin(source: fx.Node, target: fx.Node) -> None:
    """Note on an input where it came from: AOTAutograd looks for it below a Dynamo backend.

    Replaced by: an entry of `node.meta`.
    """
    if hasattr(source, "_dynamo_source"):
        target._dynamo_source = source._dynamo_source


# Inductor and AOTInductor: torch.compile reaches them through `mode=` and `options=`, but a backend
# of our own cannot, and the compiler of packages has no other entrance; torch's documentation names
# these functions as they are. Imported inside: inductor takes a second.


def inductor_modes() -> Mapping[str, Mapping[str, Any]]:
    """Return the options of inductor by the `mode` of torch.compile that sets them."""
    modes: Mapping[str, Mapping[str, Any]] = torch._inductor.list_mode_options()
    return modes


def inductor_settings() -> Sequence[str]:
    """Return the names of inductor's options."""
    return torch._inductor.list_options()


def compile_with_inductor(
    module: fx.GraphModule, inputs: Sequence[Any], options: Mapping[str, Any]
) -> Callable[..., Any]:
    """Compile a graph below Dynamo, as `torch.compile` would with these options."""
    from torch._inductor.compile_fx import compile_fx

    compiled: Any = compile_fx(module, list(inputs), config_patches=dict(options))
    return compiled  # type: ignore[no-any-return]


def freezing() -> AbstractContextManager[Any]:
    """While this is open, what is captured gets its weights as constants.

    Dynamo looks at the setting when it captures, which an option of `torch.compile` comes too late
    for. Replaced by: `options={"freezing": True}`, once it comes in time.
    """
    from torch._inductor import config

    patched: AbstractContextManager[Any] = config.patch(freezing=True)
    return patched


def write_package(
    program: torch.export.ExportedProgram, path: str, options: Mapping[str, Any]
) -> None:
    """Compile an exported program ahead of time into a file, `.pt2`."""
    # Without gradients, since weights become constants only then, where options ask for it.
    with torch.no_grad():
        torch._inductor.aoti_compile_and_package(
            program, package_path=path, inductor_configs=dict(options)
        )


def load_package(path: str) -> Callable[..., Any]:
    """Load what `write_package` wrote."""
    loaded: Callable[..., Any] = torch._inductor.aoti_load_package(path)
    return loaded


def lookup_backend(name: str) -> Callable[..., Any]:
    """Return a backend of `torch.compile` by its name, to be called by another one.

    `torch.compiler.list_backends` is public, and lists names only. Replaced by: a public lookup.
    """
    from torch._dynamo.backends.registry import lookup_backend as found

    backend: Callable[..., Any] = found(name)
    return backend
