"""Capture: a module becomes a `torch.fx` graph in the ATen training IR of `torch.export`.

A module that `torch.export` rejects is traced on the example instead
(docs/adr/0010-eager-fallback.md).
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Collection, Mapping
from contextlib import redirect_stderr
from contextvars import copy_context
from dataclasses import dataclass, field
from functools import cached_property
from io import StringIO
from typing import Any

import torch
from torch import fx, nn
from torch.export import Dim, ExportedProgram

from fxfuse.errors import CaptureError
from fxfuse.graph.eager import alone, trace
from fxfuse.graph.example import (
    Example,
    at_least_two,
    check_example,
    first_line,
    is_single,
    try_example,
)
from fxfuse.graph.fixed_batch import batch_sizes, open_sizes
from fxfuse.graph.functional import written_names
from fxfuse.graph.module_checks import check_model, state_of
from fxfuse.graph.rebuild import rebuild
from fxfuse.graph.run import untouched
from fxfuse.graph.source_lines import source_of_error
from fxfuse.graph.tensors import fetch, is_constant, tensors_in
from fxfuse.graph.torch_compat import forget_code, forget_sizes, original_module, pytree


@dataclass(frozen=True)
class Program:
    """A captured network: an eval-mode ATen graph with its tensors.

    Attributes:
        module: The rebuilt graph module. `get_attr` targets are `state_dict()` names or constants.
        names: Names of the model's `state_dict()`, in its order, parameters and buffers.
        canonical: For each name, the first name under which the same tensor appears (itself,
            unless the tensor is tied).
        example_inputs: Positional and keyword inputs that the graph was captured with.
        source: The user's own module; None when an `ExportedProgram` was captured.
        refusal: Why torch.export rejected the module, one line. Then the graph is a trace that
            holds for the example only, and no program. "" for an exported graph.
        heads: Names of tensors that only one member has → the number of that member (partial
            fusion, `fxfuse.analysis.heads`).
    """

    module: fx.GraphModule
    names: tuple[str, ...]
    canonical: Mapping[str, str]
    example_inputs: tuple[tuple[Any, ...], dict[str, Any]]
    source: nn.Module | None = None
    refusal: str = ""
    heads: Mapping[str, int] = field(default_factory=dict)

    @property
    def is_exported(self) -> bool:
        """Whether the graph can be run on other inputs (it was exported, not traced)."""
        return not self.refusal

    def require_exported(self) -> None:
        """Check that the graph can be run."""
        if not self.is_exported:
            raise CaptureError(
                "this network has no exported graph",
                where=type(self.source).__name__,
                why=f"torch.export rejected it, and a trace of the example cannot run on other "
                f"inputs: {self.refusal}",
                how="use result.to_module() or result.load_into(model), which put the fused "
                "weights into your own class; or make the forward pass exportable",
            )

    @property
    def graph(self) -> fx.Graph:
        """The ATen graph."""
        return self.module.graph

    @property
    def dynamic_batch(self) -> bool:
        """Whether dimension 0 of an input is symbolic."""
        return any(isinstance(n, torch.SymInt) for n in batch_sizes(self.graph).values())

    def outputs(self) -> tuple[Any, ...]:
        """Return the graph's outputs in flattened order: nodes, or constants."""
        (result,) = (node.args[0] for node in self.graph.nodes if node.op == "output")
        return tuple(pytree.tree_leaves(result))

    @alone
    def tensor(self, name: str) -> torch.Tensor:
        """Return the tensor behind a `get_attr` target or a `state_dict()` name."""
        return fetch(self.module, name)

    def state(self) -> dict[str, torch.Tensor]:
        """Return the tensors of `state_dict()`, detached and not copied, in the model's order."""
        return {name: self.tensor(name).detach() for name in self.names}

    def once(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Of tensors by `state_dict()` name, each tied one once, under its canonical name."""
        return {name: tensor for name, tensor in state.items() if self.canonical[name] == name}

    def reached(self) -> frozenset[str]:
        """Return the canonical names of the state tensors that the graph uses."""
        return self._reached

    @cached_property
    def written(self) -> frozenset[str]:
        """Canonical names of the state tensors that the graph writes: data that runs change."""
        names = written_names(self.graph)
        return frozenset(self.canonical[name] for name in names if name in self.canonical)

    @cached_property
    def _reached(self) -> frozenset[str]:
        used = {str(n.target) for n in self.graph.nodes if n.op == "get_attr" and n.users}
        return frozenset(self.canonical[name] for name in used if name in self.canonical)

    def unread_modules(self) -> tuple[str, ...]:
        """Return the outermost modules of whose weights the graph reads none, as of training's."""
        reached = self.reached()
        weights = [name for name in self.names if not is_constant(self.tensor(name))]
        read = [name for name in weights if self.canonical[name] in reached]
        parents = {part for name in read for part in _parents(name)}
        unread = (n for n in weights if self.canonical[n] not in reached)
        outermost = (next((p for p in (*_parents(n), n) if p not in parents), n) for n in unread)
        return tuple(dict.fromkeys(outermost))

    def unreached(self, excused: Collection[str] = ()) -> tuple[str, ...]:
        """Return names of the weights that a trace did not reach, so that nothing is known of them.

        Returns:
            Always empty for an exported graph, which holds every branch that there is.
        """
        if self.is_exported:
            return ()
        reached = self.reached()
        return tuple(
            name
            for name in self.names
            if self.canonical[name] not in reached
            and name not in excused
            and not is_constant(self.tensor(name))
        )


def _parents(name: str) -> list[str]:
    """Return the modules that a tensor is in, from the outermost to its own."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


@alone
def capture(
    model: nn.Module | ExportedProgram,
    example: Any = (),
    *,
    fallback: bool = True,
) -> Program:
    """Capture a network in eval mode; the model itself is left as it was.

    Args:
        model: An `nn.Module`, a `torch.fx.GraphModule` or a `torch.export.ExportedProgram`.
        example: A tensor, a tuple of positional inputs, a mapping of keyword inputs, or an
            `Example`; a batch of at least 2. A single example is repeated, if the model answers
            both as it answers one. Unless the `Example` has dynamic shapes, dimension 0 of every
            tensor input is dynamic; a model that cannot be captured so is captured with a static
            batch, and a warning says so.
        fallback: Whether a module that `torch.export` rejects is traced on the example instead
            (docs/adr/0010-eager-fallback.md); a warning says so.

    Returns:
        The captured network. Its tensors are those of the model, not copies.

    Raises:
        InputError: The example inputs are sparse, empty or NaN, or the model rejects them.
        MemberError: The model holds sparse or quantised tensors.
        CaptureError: `torch.export` rejects the model, and it cannot be traced or `fallback` is
            False; or it returns no tensor.
    """
    if isinstance(model, nn.Module):
        model = original_module(model)
    check_model(model)
    given = Example.of(example)
    args, kwargs, dynamic_shapes = given.args, dict(given.kwargs), given.dynamic_shapes
    check_example(args, kwargs)
    if isinstance(model, ExportedProgram):
        program = model
    else:
        with untouched(model):
            answer = try_example(model, args, kwargs)
            if dynamic_shapes is None:
                args, kwargs = at_least_two(model, args, kwargs, answer)
            try:
                program = export(model, args, kwargs, dynamic_shapes)
            except CaptureError as error:
                if not fallback:
                    raise
                warnings.warn(
                    f"torch.export rejects {type(model).__name__}, so it is traced on the example "
                    f"inputs: the fused weights go into your own class, and no GraphModule is "
                    f"emitted. The reason: {error.why}",
                    stacklevel=3,
                )
                return capture_eagerly(model, Example(args, kwargs), refusal=error.why)
    state = state_of(model)
    module = rebuild(program.module(check_guards=False), state)
    source = None if isinstance(model, ExportedProgram) else model
    return Program(module, tuple(state), _canonical(state), (args, kwargs), source)


@alone
def capture_eagerly(
    model: nn.Module,
    example: Any,
    *,
    refusal: str,
) -> Program:
    """Capture a trace of one eager run in eval mode: for the analysis only, never to be run.

    Args:
        model: A module that `torch.export` rejects; it is left as it was.
        example: As in `capture`.
        refusal: Why `torch.export` rejects it.

    Raises:
        InputError: The model rejects the example inputs.
        CaptureError: The model cannot be traced.
    """
    model = original_module(model)
    given = Example.of(example)
    args, kwargs = given.args, dict(given.kwargs)
    check_model(model)
    check_example(args, kwargs)
    state = state_of(model)
    with untouched(model):
        try_example(model, args, kwargs)
        traced = trace(model, args, kwargs, state)
    # What leaves the graph as a number has no users in it, and must stay all the same.
    module = rebuild(traced, state, prune=False)
    return Program(module, tuple(state), _canonical(state), (args, kwargs), model, refusal)


def check_reached(program: Program, excused: Collection[str] = ()) -> None:
    """Check that a trace reached every weight."""
    missing = program.unreached(excused)
    if missing:
        raise CaptureError(
            f"the example inputs do not reach {len(missing)} of the network's tensors",
            where=", ".join(missing),
            why="torch.export rejects the network, and a trace of the example does not show how "
            "other branches use them",
            how="pass an example that reaches them, or name them in ignore=",
        )


def _canonical(state: Mapping[str, torch.Tensor]) -> dict[str, str]:
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in state.items()}


@alone
def export(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any
) -> ExportedProgram:
    """Export a network in eval mode; by default with a dynamic batch, where that can be.

    Args:
        model: The network.
        args: Example inputs.
        kwargs: Keyword inputs.
        dynamic_shapes: Passed to `torch.export.export` unchanged. None: dimension 0 of every tensor
            input is dynamic; a network that cannot be exported so gets a static batch, with a
            warning.
    """
    if dynamic_shapes is not None:
        return _export_once(model, args, kwargs, dynamic_shapes)
    # By name, as export binds them: what `*args` and `**kwargs` take is nested.
    bound = inspect.signature(model.forward).bind(*args, **kwargs)
    shapes = pytree.tree_map(_batch_dynamic, dict(bound.arguments))
    if any(x.dim() for x in tensors_in((args, kwargs))):
        try:
            return _export_once(model, args, kwargs, shapes)
        except CaptureError as error:
            try:
                with open_sizes() as lines:
                    return _export_once(model, args, kwargs, shapes)
            except CaptureError:
                program = _export_once(model, args, kwargs, None)
            why = f"torch.export could not keep the batch dimension dynamic: {error.why}"
            if line := next(filter(None, lines), ""):
                why = f"a size becomes a number, after which no batch is open: {line}"
            if is_single(args, kwargs):
                why = (
                    "the example holds one, and the model does not answer two of it alike; pass "
                    "a batch of 2 or more"
                )
            warnings.warn(
                f"captured with a static batch, because {why}",
                stacklevel=5,
            )
            return program
    return _export_once(model, args, kwargs, None)


def _batch_dynamic(value: Any) -> Any:
    return {0: Dim.DYNAMIC} if isinstance(value, torch.Tensor) and value.dim() else None


def _exported(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any
) -> ExportedProgram:
    program = torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
    if any(_is_vmap(node.target) for node in program.graph.nodes):
        # Rules know no batched tensors: this writes out what is done to each.
        program = program.run_decompositions({})
        warnings.warn(
            "torch.vmap is written out in operators of inference: batch norms freeze, and there "
            "is no dropout when the result is trained",
            stacklevel=8,
        )
    return program


def _is_vmap(target: Any) -> bool:
    return str(getattr(target, "__module__", "")).startswith("torch._functorch")


def _export_once(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any
) -> ExportedProgram:
    # Fresh tensor objects: export leaves its marks of dynamic dimensions on the ones it is given.
    args, kwargs = pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs))
    try:
        with redirect_stderr(StringIO()) as said:
            # In a context of its own, or torch leaves two variables in the caller's for good.
            program = copy_context().run(_exported, model, args, kwargs, dynamic_shapes)
        forget_sizes(program)
        forget_code()
        # Only now: when it fails, torch prints its unfinished graph, up to thousands of lines.
        sys.stderr.write(said.getvalue())
        return program
    except Exception as error:
        raise CaptureError(
            f"torch.export cannot capture {type(model).__name__}",
            why=" at ".join(filter(None, (first_line(error), source_of_error(error)))),
            how="make the forward pass exportable (no data-dependent Python branches; see "
            "https://docs.pytorch.org/docs/stable/export.html), pass dynamic_shapes, or pass an "
            "ExportedProgram that you captured yourself",
        ) from error
