"""Capture: a module becomes a `torch.fx` graph in the ATen training IR of `torch.export`.

The graph is rebuilt node by node into a plain `torch.fx.GraphModule`, because the module that
`torch.export` hands out can neither be put into `train()` nor pickled
(docs/adr/0001-training-ir.md).
"""

from __future__ import annotations

import linecache
import operator
import re
import sys
import warnings
from collections.abc import Collection, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any, cast

import torch
import torch.utils._pytree as pytree
from torch import fx, nn
from torch.export import Dim, ExportedProgram

from fxfuse.eager import answers, eval_mode, trace
from fxfuse.errors import (
    CaptureError,
    MemberMismatchError,
    NotEmittedError,
    UnreachedParametersError,
)
from fxfuse.example import at_least_two, check_example, first_line, is_single, try_example
from fxfuse.functional import functional
from fxfuse.members import check_model, state_of

#: Operators that only state facts which hold for the captured device and dtype: they would break
#: the fused module after `.to("cuda")` or `.to(torch.bfloat16)`.
_ASSERTIONS = (torch.ops.aten._assert_tensor_metadata.default,)

#: Position of the `training` argument of operators that behave differently in training.
TRAINING_ARGUMENT: dict[Any, int] = {
    torch.ops.aten.batch_norm.default: 5,
    torch.ops.aten.instance_norm.default: 5,
    torch.ops.aten.dropout.default: 2,
    torch.ops.aten.dropout_.default: 2,
    torch.ops.aten.feature_dropout.default: 2,
    torch.ops.aten.feature_dropout_.default: 2,
    torch.ops.aten.alpha_dropout.default: 2,
    torch.ops.aten.alpha_dropout_.default: 2,
    torch.ops.aten.feature_alpha_dropout.default: 2,
    torch.ops.aten.feature_alpha_dropout_.default: 2,
    torch.ops.aten.rrelu.default: 3,
    torch.ops.aten.rrelu_.default: 3,
    torch.ops.aten.lstm.input: 6,
    torch.ops.aten.gru.input: 6,
    torch.ops.aten.rnn_tanh.input: 6,
    torch.ops.aten.rnn_relu.input: 6,
}

#: Regions that only change how their operators run (gradients, autocast, recomputation), with the
#: position of their subgraph. An autocast region runs in the dtype of its operands once inlined.
_REGIONS: dict[Any, int] = {
    torch.ops.higher_order.wrap_with_set_grad_enabled: 1,
    torch.ops.higher_order.wrap_with_autocast: 4,
    torch.ops.higher_order.tag_activation_checkpoint: 0,
}

#: Position of the running mean of operators that always use the batch's statistics without one.
_RUNNING_MEAN: dict[Any, int] = {
    torch.ops.aten.batch_norm.default: 3,
    torch.ops.aten.instance_norm.default: 3,
}

_TORCH_ROOT = f"{Path(torch.__file__).parent}/"
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)')


@dataclass(frozen=True)
class Captured:
    """A captured network: an eval-mode ATen graph with its tensors.

    Attributes:
        module: The rebuilt graph module. `get_attr` targets are `state_dict()` names or constants.
        names: Names of the model's `state_dict()`, in its order, parameters and buffers.
        canonical: For each name, the first name under which the same tensor appears (itself,
            unless the tensor is tied).
        example_inputs: Positional and keyword inputs that the graph was captured with.
        source: The user's own module; None when an `ExportedProgram` was captured.
        refusal: Why torch.export refused the module, one line. Then the graph is a trace that
            holds for the example only, and no program. "" for an exported graph.
        heads: Names of tensors that only one member has → the number of that member (partial
            fusion, `fxfuse.heads`).
    """

    module: fx.GraphModule
    names: tuple[str, ...]
    canonical: Mapping[str, str]
    example_inputs: tuple[tuple[Any, ...], dict[str, Any]]
    source: nn.Module | None = None
    refusal: str = ""
    heads: Mapping[str, int] = field(default_factory=dict)

    @property
    def is_program(self) -> bool:
        """Whether the graph can be run on other inputs (it was exported, not traced)."""
        return not self.refusal

    def require_program(self) -> None:
        """Checks that the graph can be run.

        Raises:
            NotEmittedError: It is a trace, which holds for the example only.
        """
        if not self.is_program:
            raise NotEmittedError(
                "no GraphModule can be emitted for this network",
                where=type(self.source).__name__,
                why=f"torch.export refused it, so its graph is a trace of the example: "
                f"{self.refusal}",
                how="use FusionResult.to_module() or load_into(model), which put the fused weights "
                "into your own class; or make the forward pass exportable",
            )

    @property
    def graph(self) -> fx.Graph:
        """The ATen graph."""
        return self.module.graph

    @property
    def dynamic_batch(self) -> bool:
        """Whether dimension 0 of an input is symbolic."""
        inputs = [n.meta.get("val") for n in self.graph.nodes if n.op == "placeholder"]
        return any(
            isinstance(x, torch.Tensor) and x.dim() > 0 and isinstance(x.shape[0], torch.SymInt)
            for x in inputs
        )

    def outputs(self) -> tuple[Any, ...]:
        """The graph's outputs in flattened order: nodes, or constants."""
        (result,) = (node.args[0] for node in self.graph.nodes if node.op == "output")
        return tuple(pytree.tree_leaves(result))

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor behind a `get_attr` target or a `state_dict()` name."""
        return fetch(self.module, name)

    def state(self) -> dict[str, torch.Tensor]:
        """The tensors of `state_dict()`, detached and not copied, in the model's order."""
        return {name: self.tensor(name).detach() for name in self.names}

    def once(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Of tensors by `state_dict()` name, each tied one once, under its canonical name."""
        return {name: tensor for name, tensor in state.items() if self.canonical[name] == name}

    def reached(self) -> frozenset[str]:
        """Canonical names of the state tensors that the graph uses."""
        used = {str(n.target) for n in self.graph.nodes if n.op == "get_attr" and n.users}
        return frozenset(self.canonical[name] for name in used if name in self.canonical)

    def unreached(self, excused: Collection[str] = ()) -> tuple[str, ...]:
        """Names of the weights that a trace did not reach, so that nothing is known of them.

        Args:
            excused: Names that do not count.

        Returns:
            Always empty for an exported graph, which holds every branch that there is.
        """
        if self.is_program:
            return ()
        reached = self.reached()
        return tuple(
            name
            for name in self.names
            if self.canonical[name] not in reached
            and name not in excused
            and not is_constant(self.tensor(name))
        )


def fetch(module: nn.Module, target: str) -> torch.Tensor:
    """The tensor attribute of a dotted name."""
    prefix, _, leaf = target.rpartition(".")
    value = getattr(module.get_submodule(prefix), leaf)
    assert isinstance(value, torch.Tensor)
    return value


def source_of(node: fx.Node) -> str:
    """Innermost frame of the user's code that made this node, as `file:line  code`.

    Frames inside torch itself are passed over; empty when the node has no stack trace.
    """
    frames = [(m["file"], int(m["line"])) for m in _FRAME.finditer(node.stack_trace or "")]
    outside = [frame for frame in frames if not frame[0].startswith(_TORCH_ROOT)]
    if not outside:
        return ""
    file, line = outside[-1]
    return f"{file}:{line}  {linecache.getline(file, line).strip()}".rstrip()


def where_of(node: fx.Node) -> str:
    """Name and source line of a node, for messages."""
    return f"node {node.name!r}  {source_of(node)}".rstrip()


def capture(
    model: nn.Module | ExportedProgram,
    example_inputs: Any,
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    fallback: bool = True,
) -> Captured:
    """Captures a network in eval mode; the model itself is left as it was.

    Args:
        model: An `nn.Module`, a `torch.fx.GraphModule` or a `torch.export.ExportedProgram`.
        example_inputs: A tensor or a tuple of positional inputs; a batch of at least 2. A single
            example is repeated, if the model answers both as it answers one.
        example_kwargs: Keyword inputs.
        dynamic_shapes: Passed to `torch.export.export` unchanged. By default dimension 0 of every
            tensor input is dynamic; a model that cannot be captured so is captured with a static
            batch, and a warning says so.
        fallback: Whether a module that `torch.export` refuses is traced on the example instead
            (docs/adr/0010-eager-fallback.md); a warning says so.

    Returns:
        The captured network. Its tensors are those of the model, not copies.

    Raises:
        ExampleInputError: The example inputs are sparse, empty or NaN, or the model rejects them.
        UnsupportedTensorError: The model holds sparse or quantised tensors.
        CaptureError: `torch.export` cannot capture the model, nor can it be traced if `fallback`;
            or it returns no tensor.
    """
    check_model(model)
    args = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    kwargs = dict(example_kwargs or {})
    check_example(args, kwargs)
    if isinstance(model, ExportedProgram):
        program = model
    else:
        with eval_mode(model):
            answer = try_example(model, args, kwargs)
            if dynamic_shapes is None:
                args, kwargs = at_least_two(model, args, kwargs, answer)
            try:
                program = _export(model, args, kwargs, dynamic_shapes)
            except CaptureError as error:
                if not fallback:
                    raise
                warnings.warn(
                    f"torch.export refuses {type(model).__name__}, so it is traced on the example "
                    f"inputs: the fused weights go into your own class, and no GraphModule is "
                    f"emitted. The reason: {error.why}",
                    stacklevel=2,
                )
                return capture_eagerly(model, args, kwargs, refusal=error.why)
    state = state_of(model)
    module = rebuild(program.module(check_guards=False), state)
    source = None if isinstance(model, ExportedProgram) else model
    return Captured(module, tuple(state), _canonical(state), (args, kwargs), source)


def capture_eagerly(
    model: nn.Module,
    example_inputs: Any,
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    refusal: str,
) -> Captured:
    """Captures a trace of one eager run in eval mode: for the analysis only, never to be run.

    Args:
        model: A module that `torch.export` refuses; it is left as it was.
        example_inputs: A tensor or a tuple of positional inputs.
        example_kwargs: Keyword inputs.
        refusal: Why `torch.export` refuses it.

    Raises:
        ExampleInputError: The model rejects the example inputs.
        CaptureError: The model cannot be traced.
    """
    args = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    kwargs = dict(example_kwargs or {})
    check_model(model)
    check_example(args, kwargs)
    state = state_of(model)
    with eval_mode(model):
        try_example(model, args, kwargs)
        traced = trace(model, args, kwargs, state)
    # What leaves the graph as a number has no users in it, and must stay all the same.
    module = rebuild(traced, state, prune=False)
    return Captured(module, tuple(state), _canonical(state), (args, kwargs), model, refusal)


def _canonical(state: Mapping[str, torch.Tensor]) -> dict[str, str]:
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in state.items()}


def _export(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any
) -> ExportedProgram:
    if dynamic_shapes is not None:
        return _export_once(model, args, kwargs, dynamic_shapes)
    batched = pytree.tree_map(_batch_dynamic, (args, kwargs))
    # Keyword inputs of a model are given to export by name, positional ones by position.
    shapes = batched[0] if not kwargs else (*batched[0], *batched[1].values())
    if any(isinstance(x, torch.Tensor) and x.dim() for x in pytree.tree_leaves((args, kwargs))):
        try:
            return _export_once(model, args, kwargs, shapes)
        except CaptureError as error:
            program = _export_once(model, args, kwargs, None)
            why = f"torch.export could not keep the batch dimension dynamic: {error.why}"
            if is_single(args, kwargs):
                why = (
                    "the example holds one, and the model does not answer two of it alike; pass "
                    "a batch of 2 or more"
                )
            warnings.warn(
                f"captured with a static batch, because {why}",
                stacklevel=3,
            )
            return program
    return _export_once(model, args, kwargs, None)


def _batch_dynamic(value: Any) -> Any:
    return {0: Dim.DYNAMIC} if isinstance(value, torch.Tensor) and value.dim() else None


def _export_once(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any
) -> ExportedProgram:
    # Fresh tensor objects: export leaves its marks of dynamic dimensions on the ones it is given.
    args, kwargs = pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs))
    try:
        with redirect_stderr(StringIO()) as said:
            program = torch.export.export(
                model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False
            )
        # Only now: when it fails, torch prints its unfinished graph, up to thousands of lines.
        sys.stderr.write(said.getvalue())
        return program
    except Exception as error:
        raise CaptureError(
            f"torch.export cannot capture {type(model).__name__}",
            why=first_line(error),
            how="make the forward pass exportable (no data-dependent Python branches; see "
            "https://docs.pytorch.org/docs/stable/export.html), pass dynamic_shapes, or pass an "
            "ExportedProgram that you captured yourself",
        ) from error


def rebuild(
    source: fx.GraphModule, state: Mapping[str, torch.Tensor], *, prune: bool = True
) -> fx.GraphModule:
    """Copies an exported graph into a fresh graph module that holds `state`.

    Args:
        source: What `ExportedProgram.module()` returns.
        state: Tensors by `state_dict()` name, kept even where the graph does not use them.
        prune: Whether nodes without users are left out, and writes into activations become values.

    Returns:
        A graph module in eval mode: `no_grad` regions inlined, assertions dropped, every
        `training` argument False.
    """
    # Attached before the graph is set: GraphModule itself would copy only what the graph reads,
    # in the order of the graph, and lose the names and the order of the state_dict.
    module = fx.GraphModule({}, fx.Graph())
    for name, tensor in state.items():
        attach(module, name, tensor, persistent=True)
    graph = fx.Graph()
    graph._codegen = source.graph._codegen
    _Copier(source, graph, state).run()
    if prune:
        # The copy holds views that nobody may read: only pruning makes it small again.
        graph = functional(graph)
    for node in graph.nodes:
        if node.op == "get_attr" and node.target not in state:
            attach(module, node.target, fetch(source, node.target), persistent=False)
        if follows_mode(node):
            _set_eval(node, TRAINING_ARGUMENT[node.target])
    if prune:
        # Nodes with a side effect (an in-place fill of a mask) are kept by fx's own rule.
        graph.eliminate_dead_code()
    graph.lint()
    module.graph = graph
    module.eval()
    return module


def follows_mode(node: fx.Node) -> bool:
    """Whether an operator behaves differently in training."""
    mean = _RUNNING_MEAN.get(node.target)
    return node.target in TRAINING_ARGUMENT and (mean is None or node.args[mean] is not None)


def _set_eval(node: fx.Node, position: int) -> None:
    """Writes the `training` argument out as False; export omits it where that is the default."""
    target: Any = node.target
    defaults = [argument.default_value for argument in target._schema.arguments]
    args = [*node.args, *defaults[len(node.args) : position + 1]]
    args[position] = False
    node.args = tuple(args)


class _Copier:
    """Copies a graph, inlines its subgraphs and drops what must not survive."""

    def __init__(
        self, source: fx.GraphModule, graph: fx.Graph, state: Mapping[str, torch.Tensor]
    ) -> None:
        self.source = source
        self.graph = graph
        self.state = state
        self.environment: dict[fx.Node, Any] = {}

    def run(self) -> None:
        for node in self.source.graph.nodes:
            self.copy(node, self.source)

    def copy(self, node: fx.Node, owner: fx.GraphModule) -> None:
        if node.target in _ASSERTIONS or node.op == "call_module":
            return
        if node.op == "get_attr" and self.is_subgraph(str(node.target), owner):
            return
        if node.target in _REGIONS:
            self.environment[node] = self.inline(node, owner)
            return
        argument = node.args[0] if node.args else None
        if (
            node.target is operator.getitem
            and isinstance(argument, fx.Node)
            and isinstance(self.environment.get(argument), tuple | list)
        ):
            self.environment[node] = self.environment[argument][node.args[1]]
            return
        if any(n not in self.environment for n in node.all_input_nodes):
            raise CaptureError(
                f"the graph holds a region that cannot be inlined: {node.target}",
                where=where_of(node),
                why="torch.export keeps torch.cond and the like as subgraphs, in which neurons "
                "cannot be followed",
                how="write the forward pass without the region (torch.where for both branches)",
            )
        copied = self.graph.node_copy(node, lambda n: self.environment[n])
        self.environment[node] = copied

    def is_subgraph(self, target: str, owner: fx.GraphModule) -> bool:
        return target not in self.state and isinstance(_attribute(owner, target), nn.Module)

    def inline(self, call: fx.Node, owner: fx.GraphModule) -> Any:
        subgraph, *operands = cast("tuple[fx.Node, ...]", call.args[_REGIONS[call.target] :])
        body = _attribute(owner, str(subgraph.target))
        inputs = iter(operands)
        for node in body.graph.nodes:
            if node.op == "placeholder":
                self.environment[node] = self.environment[next(inputs)]
            elif node.op == "output":
                return fx.map_arg(node.args[0], lambda n: self.environment[n])
            else:
                self.copy(node, body)
        return ()


def _attribute(owner: nn.Module, target: str) -> Any:
    value: Any = owner
    for part in target.split("."):
        value = getattr(value, part)
    return value


def attach(root: nn.Module, name: str, tensor: torch.Tensor, *, persistent: bool) -> None:
    """Registers a tensor under a dotted name: parameters as parameters, the rest as buffers."""
    *path, leaf = name.split(".")
    owner = root
    for part in path:
        if not hasattr(owner, part):
            owner.add_module(part, nn.Module())
        owner = getattr(owner, part)
    if isinstance(tensor, nn.Parameter):
        owner.register_parameter(leaf, tensor)
    else:
        owner.register_buffer(leaf, tensor, persistent=persistent)


def check_same_network(members: Sequence[Captured]) -> None:
    """Checks that the members have one graph, the same tensors and the same constants.

    Members that were traced have other sizes in their graphs, so they are compared by what they
    answer: the first member's module with another member's weights has to answer as that member.

    Raises:
        MemberMismatchError: Names the first difference.
    """
    first = members[0]
    for number, other in enumerate(members[1:], start=1):
        _check_tensors(first, other, number)
        if first.is_program and other.is_program:
            _check_graph(first, other, number)
        else:
            _check_answers(first, other, number)


def check_reached(captured: Captured, excused: Collection[str] = ()) -> None:
    """Checks that a trace reached every weight.

    Args:
        captured: A captured network.
        excused: `state_dict()` names that need not be reached.

    Raises:
        UnreachedParametersError: Lists the weights that the trace did not reach.
    """
    missing = captured.unreached(excused)
    if missing:
        raise UnreachedParametersError(
            f"the example inputs do not reach {len(missing)} of the network's tensors",
            where=", ".join(missing),
            why="the network was traced on the example, and what another branch does with these "
            "is unknown",
            how="pass an example that reaches them, or name them in ignore=",
        )


def _mismatch(what: str, number: int, where: str, why: str) -> MemberMismatchError:
    return MemberMismatchError(
        f"member {number} differs from member 0: {what}",
        where=where,
        why=why,
        how="give members of one architecture, built with the same arguments",
    )


def _check_tensors(first: Captured, other: Captured, number: int) -> None:
    for name in [*first.names, *(n for n in other.names if n not in first.canonical)]:
        if (name in other.canonical) != (name in first.canonical):
            owner = "member 0" if name in first.canonical else f"member {number}"
            raise _mismatch("tensor names", number, name, f"only {owner} has this tensor")
        ours, theirs = first.tensor(name), other.tensor(name)
        if ours.shape != theirs.shape:
            raise _mismatch("shapes", number, name, f"{tuple(ours.shape)} vs {tuple(theirs.shape)}")
        if ours.dtype != theirs.dtype:
            raise _mismatch("dtypes", number, name, f"{ours.dtype} vs {theirs.dtype}")
        if first.canonical[name] != other.canonical[name]:
            raise _mismatch(
                "tied parameters",
                number,
                name,
                f"same tensor as {first.canonical[name]!r} vs same as {other.canonical[name]!r}",
            )


def _check_answers(first: Captured, other: Captured, number: int) -> None:
    if first.source is None or other.source is None or first.is_program != other.is_program:
        raise _mismatch("capture", number, "", "only one of them can be exported")
    args, kwargs = other.example_inputs
    expected = answers(other.source, {}, args, kwargs)
    try:
        found = answers(first.source, other.once(other.state()), args, kwargs)
        # Leaves, since outputs may be of a type that only pytree knows.
        torch.testing.assert_close(
            *(
                [x for x in pytree.tree_leaves(y) if isinstance(x, torch.Tensor)]
                for y in (found, expected)
            ),
            equal_nan=True,
        )
    except Exception as error:
        raise _mismatch(
            "answers",
            number,
            type(other.source).__name__,
            f"member 0 with its weights answers otherwise: {first_line(error)}",
        ) from error


def _check_graph(first: Captured, other: Captured, number: int) -> None:
    ours, theirs = list(first.graph.nodes), list(other.graph.nodes)
    position = {node: index for index, node in enumerate(ours)}
    position_theirs = {node: index for index, node in enumerate(theirs)}
    for a, b in zip(ours, theirs, strict=False):
        line_a, line_b = _signature(a, position), _signature(b, position_theirs)
        if line_a != line_b:
            raise _mismatch(
                "graphs",
                number,
                where_of(a),
                f"{a.format_node()} vs {b.format_node()}",
            )
        if a.op == "get_attr" and _is_constant(first, str(a.target)):
            value, value_other = first.tensor(str(a.target)), other.tensor(str(b.target))
            if value.dtype != value_other.dtype or not torch.equal(value, value_other):
                why = f"a constant ({value.dtype}) that the graph reads has another value"
                if str(a.target) in first.canonical:
                    why += "; integer tensors are constants, quantised weights too: fuse the "
                    why += "floating-point networks and quantise the result"
                raise _mismatch("constants", number, str(a.target), why)
    if len(ours) != len(theirs):
        raise _mismatch("graphs", number, "end of the graph", f"{len(ours)} vs {len(theirs)} nodes")


def is_constant(tensor: torch.Tensor) -> bool:
    """Whether a state tensor is a constant of the network: integer and boolean tensors are."""
    return not (tensor.is_floating_point() or tensor.is_complex())


def _is_constant(captured: Captured, target: str) -> bool:
    return target not in captured.canonical or is_constant(captured.tensor(target))


def _signature(node: fx.Node, position: Mapping[fx.Node, int]) -> tuple[Any, ...]:
    def plain(value: Any) -> Any:
        return fx.map_arg(value, lambda n: ("node", position[n]))

    target = node.target if node.op in ("get_attr", "call_function") else ""
    return (node.op, target, plain(node.args), plain(node.kwargs))
