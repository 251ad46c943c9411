"""Abstract interpretation of a captured graph: every node gets its neuron labels."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import fx

from fxfuse.analysis.conformance import check_result
from fxfuse.analysis.coupling_constraints import CouplingConstraints, Gap
from fxfuse.analysis.labels import AbstractTensor, DimLabels, Kind, positions, sources_of
from fxfuse.analysis.rules import Call, Rule, concrete_shape, find, rule_file
from fxfuse.analysis.rules.pointwise import is_pointwise, pointwise
from fxfuse.errors import FxfuseError, RuleError
from fxfuse.graph.capture import Program
from fxfuse.graph.tensors import is_constant, tensors_in
from fxfuse.graph.torch_compat import hint, pytree, schema_of

#: Constants above this size count as varying along every dimension; comparing would cost more
#: than the answer is worth.
_COMPARE_LIMIT = 1 << 22

_WRITTEN = "is written into a part of another tensor, or is in a tensor that is so written"


def interpret(
    program: Program,
    interface: Mapping[int, frozenset[int]] = MappingProxyType({}),
    keeps_groups: frozenset[str] = frozenset(),
) -> tuple[CouplingConstraints, dict[fx.Node, Any]]:
    """Run the rules over a graph.

    Args:
        program: The network.
        interface: For an output, by its index in flattened order, the dimensions that are
            interface; an output that is not listed is interface in every dimension.
        keeps_groups: Names of grouped convolutions whose groups stay where they are.

    Warns of constants on the meta device, whose values the analysis would need.

    Returns:
        The constraints: ties, freezes and mixings, and the value of every node (tensors as
        `AbstractTensor`, numbers as their hints, lists as lists).
    """
    interpreter = _Interpreter(program, interface)
    interpreter.coupling.keeps_groups = keeps_groups
    with torch.no_grad():
        interpreter.run()
    if interpreter.valueless:
        names = ", ".join(interpreter.valueless[:3])
        more = f" and {len(interpreter.valueless) - 3} more" if interpreter.valueless[3:] else ""
        warnings.warn(
            f"the constants {names}{more} are on the meta device and have no values: what depends "
            "on them freezes. Analyse the network with real buffers to see what is free.",
            stacklevel=3,
        )
    return interpreter.coupling, interpreter.values


class _Interpreter:
    def __init__(self, program: Program, interface: Mapping[int, frozenset[int]]) -> None:
        self.program = program
        self.interface = interface
        self.coupling = CouplingConstraints()
        self.values: dict[fx.Node, Any] = {}
        self.parameters: dict[str, AbstractTensor] = {}
        self.valueless: list[str] = []

    def run(self) -> None:
        for clock, node in enumerate(self.program.graph.nodes):
            self.coupling.node, self.coupling.clock = node, clock
            if node.op == "output":
                self.output()
            else:
                self.values[node] = getattr(self, node.op)(node)
        self.coupling.node = None

    def placeholder(self, node: fx.Node) -> Any:
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            return hint(value)
        shape = concrete_shape(value)
        return AbstractTensor(shape, positions=positions(shape, range(len(shape))))

    def get_attr(self, node: fx.Node) -> AbstractTensor:
        target = str(node.target)
        tensor = self.program.tensor(target).detach()
        name = self.program.canonical.get(target)
        if name is None or is_constant(tensor):
            if tensor.is_meta and tensor.dim():
                self.valueless.append(target)
            # Cloned, because in-place operators on constants are really carried out.
            return constant(tensor.clone())
        if name not in self.parameters:
            self.parameters[name] = self.coupling.parameter(name, tuple(tensor.shape))
        return self.parameters[name]

    def call_function(self, node: fx.Node) -> Any:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: self.values[n])
        args, kwargs = pytree.tree_map(hint, (args, kwargs), is_leaf=_is_leaf)
        if node.target is operator.getitem:
            return args[0][args[1]]
        produced = node.meta.get("val")
        operands = _operands(args, kwargs)
        if not tensors_in(produced):
            if torch.Tag.data_dependent_output in getattr(node.target, "tags", ()):
                # A number that Python decides by: it may depend on where each neuron stands.
                self.boundary(node, operands, has_rule=False)
            return pytree.tree_map(hint, produced)
        if self.is_foldable(node, operands):
            result = fold(node, args, kwargs)
        else:
            rule = find(node.target) or (pointwise if is_pointwise(node.target) else None)
            result = NotImplemented
            if rule is not None:
                result = self.ask(rule, Call(self.coupling, node, tuple(args), kwargs))
            if result is NotImplemented:
                result = self.boundary(node, operands, has_rule=rule is not None)
        check_result(node, result, self.coupling.count)
        result = pytree.tree_map_only(AbstractTensor, self.coupling.settled, result)
        self.mutate(node, result)
        return result

    def output(self) -> None:
        for index, result in enumerate(self.program.outputs()):
            value = self.values[result] if isinstance(result, fx.Node) else None
            if not isinstance(value, AbstractTensor):
                continue
            interface = self.interface.get(index, frozenset(range(value.rank)))
            fixed = [f for f in value.fields if interface.intersection(f.dims)]
            for f in fixed:
                self.coupling.freeze(f, Kind.OUTPUT, "reaches the network's output")
            free = tuple(f for f in value.fields if not interface.intersection(f.dims))
            # Units that are handed out are not interchangeable with units that are not.
            self.coupling.record_use(replace(value, fields=free), index)

    def is_foldable(self, node: fx.Node, operands: list[AbstractTensor]) -> bool:
        """Tell whether the result depends on neither inputs nor parameters nor symbolic sizes."""
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            return False
        made = node.target in _MADE_FROM_SIZES or (not operands and _takes_tensors(node.target))
        if not made and (not operands or any(v.constant is None for v in operands)):
            return False
        symbolic = (n.meta.get("val") for n in node.all_input_nodes)
        static = not any(isinstance(v, torch.SymInt | torch.SymFloat) for v in symbolic)
        shapes = (v.shape for v in pytree.tree_leaves(node.meta["val"]))
        return static and all(isinstance(s, int) for shape in shapes for s in shape)

    def ask(self, rule: Rule, call: Call) -> Any:
        """Ask a rule; whatever it raises is an error of the rule."""
        try:
            return rule(call)
        except FxfuseError:
            raise
        except Exception as error:
            raise RuleError(
                f"the rule of {call.node.target} failed",
                where=call.where,
                why=f"{type(error).__name__}: {error}",
                how=f"fix the rule in {rule_file(call.node.target)}; it may return NotImplemented "
                "for a use that it does not cover",
            ) from error

    def boundary(self, node: fx.Node, operands: list[AbstractTensor], *, has_rule: bool) -> Any:
        """Treat an operator without a rule: its operands freeze, its result is frozen neurons.

        Where no neuron goes in, none comes out: the result only varies.
        """
        if any(value.fields or value.is_parameter for value in operands):
            self.coupling.gaps.append(Gap(node, has_rule))
        lack = "has a rule that does not cover this use" if has_rule else "has no rule"
        name = str(node.target)
        for value in operands:
            for f in value.fields:
                # A parameter goes with the result, which is the base member's.
                why = f"goes into {name}, which {lack}"
                self.coupling.freeze(f, Kind.KEEP_BASE, why, operator=name)
                self.coupling.role(value, f, reader=True)
            if value.is_parameter:
                self.coupling.mix(f"operator {name} {lack}", sources=value.sources or frozenset())
        why, sources = f"comes out of {name}, which {lack}", sources_of(operands)
        is_labelled = any(value.fields for value in operands)

        def result(fake: Any) -> Any:
            if not isinstance(fake, torch.Tensor):
                return fake
            if not is_labelled:
                return _unlabelled(fake, sources)
            return self.frozen_value(node, fake, why, operator=name)

        return pytree.tree_map(result, node.meta.get("val"))

    def frozen_value(
        self, node: fx.Node, fake: torch.Tensor, why: str, *, operator: str = ""
    ) -> AbstractTensor:
        shape = concrete_shape(fake)
        sizes: Sequence[Any] = fake.shape  # a fake tensor has SymInt sizes, which are no int
        static = [d for d, s in enumerate(sizes) if isinstance(s, int)]
        labelled = self.coupling.parameter(f"<{node.name}>", shape)
        fields = tuple(f for f in labelled.fields if f.dims[0] in static)
        for f in fields:
            self.coupling.freeze(f, Kind.KEEP_BASE, why, operator=operator)
        return AbstractTensor(shape, fields, positions(shape, set(range(len(shape))) - set(static)))

    def mutate(self, node: fx.Node, result: Any) -> None:
        """In-place operators change the tensor that they write to, and whatever it is a view of."""
        schema = schema_of(node.target)
        if schema is None or not schema.is_mutable or not isinstance(node.args[0], fx.Node):
            return
        written = node.args[0]
        before = self.values[written]
        if before.constant is not None and result.constant is not None:
            return
        self.values[written] = result
        nothing_new = _same_labels(before, result) and result.unlabelled <= before.unlabelled
        if nothing_new and before.constant is None:
            return
        views: list[fx.Node] = []
        base = written
        while base.op == "call_function" and not _owns_memory(base):
            views.insert(0, base)
            base = base.all_input_nodes[0]
        if views:
            self.values[base] = self.overwritten(node, base, views, result)
            for view in views[:-1]:
                fake = view.meta["val"]
                self.values[view] = (
                    self.frozen_value(node, fake, _WRITTEN)
                    if self.values[base].fields
                    else _unlabelled(fake)
                )

    def overwritten(
        self, node: fx.Node, base: fx.Node, views: list[fx.Node], part: AbstractTensor
    ) -> AbstractTensor:
        """The labels of a tensor after a view of it was written to: the write runs on the ids."""
        value: AbstractTensor = self.values[base]
        if value.fields and part.fields:
            for f in (*value.fields, *part.fields):
                self.coupling.freeze(f, Kind.KEEP_BASE, _WRITTEN)
            self.coupling.mix("a part of a tensor is overwritten in place")
            return self.frozen_value(node, base.meta["val"], _WRITTEN)

        def write(old: DimLabels | None, new: DimLabels | None) -> DimLabels | None:
            whole = old.ids if old else torch.zeros([1] * value.rank, dtype=torch.int64)
            whole = whole.expand(value.shape).clone()
            self.view(whole, views).copy_(new.ids.expand(part.shape) if new else torch.zeros(()))
            return DimLabels.of(whole)

        pairs = [(old, None) for old in value.fields] + [(None, new) for new in part.fields]
        fields = tuple(f for f in (write(*pair) for pair in pairs) if f is not None)
        borders = {d for d in range(value.rank) if value.shape[d] > 1}
        labelled = {d for f in fields for d in f.dims}
        return AbstractTensor(
            value.shape,
            fields,
            positions(value.shape, value.unlabelled | borders - labelled),
            sources_of((value, part)),
        )

    def view(self, tensor: torch.Tensor, views: list[fx.Node]) -> torch.Tensor:
        """Run a chain of views on a real tensor."""
        for view in views:
            args, kwargs = fx.map_arg((view.args, view.kwargs), lambda n: self.values[n])
            args, kwargs = pytree.tree_map(hint, (args, kwargs), is_leaf=_is_leaf)
            run: Any = view.target
            if view.target is operator.getitem:
                tensor = tensor[args[1]]
            else:
                tensor = run(tensor, *args[1:], **kwargs)
        return tensor


def _unlabelled(fake: torch.Tensor, sources: frozenset[str] | None = None) -> AbstractTensor:
    """Return what an operator without a rule makes of content without labels: more of it."""
    shape = concrete_shape(fake)
    return AbstractTensor(shape, positions=positions(shape, range(len(shape))), sources=sources)


def _takes_tensors(target: Any) -> bool:
    """Tell whether an operator is for tensors: a number that it gets is one without dimensions."""
    schema = schema_of(target)
    kinds = () if schema is None else (argument.type for argument in schema.arguments)
    return any(isinstance(kind, torch.TensorType) for kind in kinds)


_MADE_FROM_SIZES = frozenset(
    getattr(getattr(torch.ops.aten, name), overload)
    for name in ("zeros", "ones", "full", "new_zeros", "new_ones", "new_full", "arange")
    for overload in getattr(torch.ops.aten, name).overloads()
    if "out" not in overload and "names" not in overload
)


def constant(tensor: torch.Tensor) -> AbstractTensor:
    """Return the value of a real tensor that depends on neither inputs nor parameters.

    One on the meta device has no values: it counts as varying along every dimension.
    """
    shape = tuple(tensor.shape)
    varying: Sequence[int] = range(len(shape))
    if tensor.is_meta:
        return AbstractTensor(shape, (), positions(shape, varying), frozenset())
    if tensor.numel() <= _COMPARE_LIMIT:
        varying = [d for d in varying if shape[d] > 1 and (tensor != tensor.narrow(d, 0, 1)).any()]
    return AbstractTensor(shape, (), positions(shape, varying), frozenset(), tensor)


def fold(node: fx.Node, args: Any, kwargs: Mapping[str, Any]) -> Any:
    """Run an operator on real constants."""
    real_args, real_kwargs = pytree.tree_map(_real, (args, dict(kwargs)), is_leaf=_is_leaf)
    result = node.target(*real_args, **real_kwargs)  # type: ignore[operator]
    return pytree.tree_map(constant, result)


def _real(argument: Any) -> Any:
    if isinstance(argument, torch.device) and argument.type == "meta":
        # What is made from sizes alone has values, whatever device the network lies on.
        return torch.device("cpu")
    if not isinstance(argument, AbstractTensor):
        return argument
    if argument.constant is not None:
        return argument.constant
    # Factories such as new_zeros take any tensor for its dtype only.
    return torch.empty(()).expand(argument.shape)


def _is_leaf(x: Any) -> bool:
    return isinstance(x, AbstractTensor)


def _operands(args: Any, kwargs: Any) -> list[AbstractTensor]:
    leaves = pytree.tree_leaves((args, kwargs), is_leaf=_is_leaf)
    return [x for x in leaves if isinstance(x, AbstractTensor)]


def _same_labels(a: AbstractTensor, b: AbstractTensor) -> bool:
    return len(a.fields) == len(b.fields) and all(
        f is g or (f.dims == g.dims and torch.equal(f.ids, g.ids))
        for f, g in zip(a.fields, b.fields, strict=True)
    )


def _owns_memory(node: fx.Node) -> bool:
    """Tell whether an operator allocates its result (its schema aliases no argument)."""
    schema = schema_of(node.target)
    if schema is None:
        return False
    if node.target in (torch.ops.aten.reshape.default, torch.ops.aten.contiguous.default):
        return False
    return all(r.alias_info is None for r in schema.returns) or schema.is_mutable
