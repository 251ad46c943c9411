"""Partial fusion: one trunk for all members, one head for each of them.

Words: a *head* is what is computed with the parameters of the modules that the caller names. Its
*region* is every node that depends on such a parameter; all else is the *trunk*. Members share the
trunk's graph, while each head has a graph, shapes and constants of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from fxfuse.analysis.constraints import names_under
from fxfuse.analysis.label_spaces import Heads
from fxfuse.errors import OptionError
from fxfuse.graph.capture import Program
from fxfuse.graph.same_network import check_same_network
from fxfuse.graph.source_lines import source_of
from fxfuse.graph.tensors import attach, is_constant, tensors_in
from fxfuse.graph.torch_compat import copy_inputs, copy_signature, output_spec, pytree, schema_of

aten = torch.ops.aten
#: Name of the constant that maps the members' logits to the union of their classes.
_PROJECTION = "_fxfuse_classes"


@dataclass(frozen=True)
class Joined:
    """The members as one network: the trunk once, and every member's head.

    Attributes:
        program: The trunk of member 0 and all heads. Tensors of head i are named
            `heads.<i>.<name>`; it returns a tuple with the outputs of each head, structured as its
            member's, or one tensor for all of them, structured as member 0's output.
        states: For each member, its tensors by those names. Its head's buffers stand under the
            names of the other heads too: there they replace units that the other member does
            not have (a variance of 0 is no variance to train with).
    """

    program: Program
    states: tuple[dict[str, torch.Tensor], ...]


def join(members: Sequence[Program], heads: Heads, dim: int = 0) -> Joined:
    """Write the trunk once and the heads side by side.

    Where heads are returned as one tensor, `dim` is the outputs' dimension of classes.
    """
    for member in members:
        member.require_exported()
    parts = [_split(member, heads) for member in members]
    check_same_network([part.trunk_alone() for part in parts])
    return _Joiner(parts, heads, dim).run()


def head_name(member: int, name: str) -> str:
    """Name of a member's head tensor in the joined network."""
    return f"heads.{member}.{name}"


def joined_state(
    program: Program, member: int, state: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return a member's tensors by their names in the joined network; what it lacks is left out."""
    own, standing_in = {}, {}
    for joined in program.names:
        owner = program.heads.get(joined, member)
        name = joined.split(".", 2)[2] if joined in program.heads else joined
        like = program.tensor(joined)
        if name not in state:
            continue
        if owner == member:
            own[joined] = state[name]
        elif not isinstance(like, nn.Parameter) and state[name].shape == like.shape:
            standing_in[joined] = state[name]
    return own | standing_in


def region_of(program: Program, names: Collection[str]) -> frozenset[fx.Node]:
    """The nodes that depend on one of the named tensors, and the constants that only they read."""
    if not names:
        return frozenset()
    graph = program.graph
    region = _dependents(graph, lambda n: n.op == "get_attr" and n.target in names)
    variable = _dependents(graph, lambda n: n.op == "placeholder" or _is_parameter(program, n))
    for node in reversed(graph.nodes):
        # Class counts are written into constants and sizes, so each head needs its own.
        is_size = node.op == "call_function" and not tensors_in(node.meta.get("val"))
        is_state = node.op == "get_attr" and node.target in program.canonical
        is_own = node.op in ("call_function", "get_attr") and not is_state
        if is_own and (is_size or node not in variable) and node.users:
            region |= {node} if region.issuperset(node.users) else set()
    return frozenset(region)


def others_region(program: Program, member: int) -> frozenset[fx.Node]:
    """Return the nodes that a member of a joined network does not have: its part is the rest."""
    return region_of(program, [name for name, own in program.heads.items() if own != member])


def _dependents(graph: fx.Graph, starts: Callable[[fx.Node], bool]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op != "output" and (starts(node) or not found.isdisjoint(node.all_input_nodes)):
            found.add(node)
    return found


def _is_parameter(program: Program, node: fx.Node) -> bool:
    """Tell whether a node reads a parameter or a float buffer."""
    name = str(node.target)
    is_state = node.op == "get_attr" and name in program.canonical
    return is_state and not is_constant(program.tensor(name))


@dataclass(frozen=True)
class _Part:
    """A member, divided into trunk and head."""

    program: Program
    names: frozenset[str]
    region: frozenset[fx.Node]

    def trunk_names(self) -> list[str]:
        return [name for name in self.program.names if name not in self.names]

    def head_names(self) -> list[str]:
        return [name for name in self.program.names if name in self.names]

    def trunk_nodes(self) -> list[fx.Node]:
        nodes = self.program.graph.nodes
        return [n for n in nodes if n not in self.region and n.op != "output"]

    def trunk_alone(self) -> Program:
        """Return the trunk as a network without outputs, to be compared with the other trunks."""
        program, names = self.program, self.trunk_names()
        module = _holder({name: program.tensor(name) for name in names})
        graph = fx.Graph()
        nodes: dict[fx.Node, fx.Node] = {}
        for node in self.trunk_nodes():
            nodes[node] = graph.node_copy(node, nodes.__getitem__)
            _attach_constant(program, node, module, str(node.target))
        graph.output(None)
        module.graph = graph
        canonical = {name: program.canonical[name] for name in names}
        return replace(program, module=module, names=tuple(names), canonical=canonical)


def _split(program: Program, heads: Heads) -> _Part:
    found = (names_under(program.names, pattern, "heads") for pattern in heads.modules or ())
    names = frozenset(name for group in found for name in group)
    for name in program.names:
        tied = program.canonical[name]
        if (name in names) != (tied in names):
            raise _error(
                "a head shares a parameter with the trunk",
                f"{name} is the same tensor as {tied}",
                "it cannot be fused and kept apart at once",
            )
    part = _Part(program, names, region_of(program, names))
    _check_part(part)
    return part


def _check_part(part: _Part) -> None:
    program, region = part.program, part.region
    if not any(node.op == "call_function" for node in region):
        raise _error(
            "the graph does not use the heads",
            ", ".join(part.head_names()[:3]),
            "no node of the captured graph depends on them",
        )
    if not any(_is_parameter(program, node) for node in part.trunk_nodes()):
        raise _error("the heads are the whole network", "", "no parameter is left to fuse")
    fed = _dependents(program.graph, lambda n: n.op == "placeholder")
    weights = _dependents(program.graph, lambda n: _is_parameter(program, n)) - fed
    for node in program.graph.nodes:
        if node not in region or node.op != "call_function":
            continue
        for source in node.all_input_nodes:
            if source in weights and source not in region:
                raise _error(
                    "a head feeds back into the trunk",
                    _place(node),
                    f"it depends on a head and reads {_parameters_of(program, source)}, "
                    "which is not in a head",
                )
        schema = schema_of(node.target)
        if schema is not None and schema.is_mutable and node.args[0] not in region:
            raise _error(
                "a head feeds back into the trunk",
                _place(node),
                "it writes in place into a tensor of the trunk, which the other heads read",
            )


def _error(what: str, where: str, why: str) -> OptionError:
    return OptionError(
        what,
        where=where,
        why=why,
        how="use heads= with the last modules of the network, and everything that follows them",
    )


def _place(node: fx.Node) -> str:
    return f"{node.name} [{node.target}]  {source_of(node)}".rstrip()


def _parameters_of(program: Program, node: fx.Node) -> str:
    """Return the names of the parameters that a node is computed from."""
    found, open_nodes = set(), [node]
    while open_nodes:
        current = open_nodes.pop()
        if _is_parameter(program, current):
            found.add(str(current.target))
        open_nodes += current.all_input_nodes
    return ", ".join(sorted(found))


class _Joiner:
    """Writes the joined graph, every node after those that it follows in its own member."""

    def __init__(self, parts: Sequence[_Part], heads: Heads, dim: int) -> None:
        self.parts = parts
        self.asked = heads
        self.dim = dim
        self.graph = fx.Graph()
        tensors = {name: parts[0].program.tensor(name) for name in parts[0].trunk_names()}
        self.canonical = {name: parts[0].program.canonical[name] for name in tensors}
        self.heads: dict[str, int] = {}
        for member, part in enumerate(parts):
            for name in part.head_names():
                joined = head_name(member, name)
                if joined in tensors:
                    raise _error(
                        "two tensors would have one name", joined, "the trunk has one of this name"
                    )
                tensors[joined] = part.program.tensor(name)
                self.canonical[joined] = head_name(member, part.program.canonical[name])
                self.heads[joined] = member
        self.module = _holder(tensors)
        self.nodes: list[dict[fx.Node, fx.Node]] = [{} for _ in parts]

    def run(self) -> Joined:
        first = self.parts[0].program
        trunks = [part.trunk_nodes() for part in self.parts]
        rows = list(zip(*trunks, strict=True))
        # Inputs first, so that nothing else takes their names.
        for row in rows:
            if row[0].op == "placeholder":
                self.trunk(row)
        chunks = [_chunks(part) for part in self.parts]
        for step, row in enumerate(rows):
            self.head(chunks, step)
            if row[0].op != "placeholder":
                self.trunk(row)
        self.head(chunks, len(rows))
        self.output()
        self.module.graph = self.graph
        self.graph.lint()
        joined = Program(
            self.module,
            tuple(self.canonical),
            self.canonical,
            first.example_inputs,
            heads=self.heads,
        )
        own = [part.program.state() for part in self.parts]
        return Joined(joined, tuple(joined_state(joined, i, s) for i, s in enumerate(own)))

    def trunk(self, row: Sequence[fx.Node]) -> None:
        copied = self.graph.node_copy(row[0], self.nodes[0].__getitem__)
        _attach_constant(self.parts[0].program, row[0], self.module, str(row[0].target))
        for nodes, node in zip(self.nodes, row, strict=True):
            nodes[node] = copied

    def head(self, chunks: Sequence[Sequence[Sequence[fx.Node]]], step: int) -> None:
        for member, part in enumerate(self.parts):
            for node in chunks[member][step]:
                copied = self.graph.node_copy(node, self.nodes[member].__getitem__)
                self.nodes[member][node] = copied
                if node.op == "get_attr":
                    copied.target = head_name(member, str(node.target))
                    _attach_constant(part.program, node, self.module, copied.target)

    def output(self) -> None:
        if self.asked.output != "tuple":
            self.one_output()
            return
        results = []
        for part, nodes in zip(self.parts, self.nodes, strict=True):
            (output,) = (n for n in part.program.graph.nodes if n.op == "output")
            results.append(fx.map_arg(output.args[0], nodes.__getitem__))
        specs = [output_spec(part.program.graph) for part in self.parts]
        if None in specs:
            # Such a graph hands out its structure as it is.
            self.graph.output(tuple(results))
            return
        self.graph.output(tuple(leaf for result in results for leaf in pytree.tree_leaves(result)))
        copy_inputs(self.parts[0].program.graph, self.graph, pytree.treespec_tuple(specs))

    def one_output(self) -> None:
        """Hand out all heads as one tensor, in the place of member 0's."""
        logits, shapes = [], []
        for part, nodes in zip(self.parts, self.nodes, strict=True):
            (output,) = (n for n in part.program.outputs() if isinstance(n, fx.Node))
            logits.append(nodes[output])
            shapes.append(output.meta["val"].shape)
        like = logits[0].meta["val"]
        sizes = list(like.shape)
        sizes[self.dim] = sum(shape[self.dim] for shape in shapes)
        result = self.written(aten.cat.default, (logits, self.dim), like.new_empty(sizes))
        if self.asked.output == "union":
            result = self.mapped(result)
        before = self.parts[0].program.graph
        (output,) = (n for n in before.nodes if n.op == "output")
        self.graph.output(fx.map_arg(output.args[0], lambda _: result))
        copy_signature(before, self.graph)

    def mapped(self, logits: fx.Node) -> fx.Node:
        """Return the mean of the logits of each class, over the members that know it."""
        dim, like = self.dim, logits.meta["val"]
        last = like.dim() - 1
        matrix = self.asked.projection(like.dtype, next(self.module.parameters()).device)
        attach(self.module, _PROJECTION, matrix, persistent=False)
        projection = self.graph.get_attr(_PROJECTION)
        projection.meta["val"] = like.new_empty(matrix.shape)

        def turned(node: fx.Node) -> fx.Node:
            if dim == last:
                return node
            value = node.meta["val"].transpose(dim, last)
            return self.written(aten.transpose.int, (node, dim, last), value)

        moved = turned(logits)
        value = moved.meta["val"]
        shape = [*value.shape[:-1], len(matrix)]
        return turned(
            self.written(aten.linear.default, (moved, projection), value.new_empty(shape))
        )

    def written(self, target: Any, args: tuple[Any, ...], value: torch.Tensor) -> fx.Node:
        node = self.graph.call_function(target, args)
        node.meta["val"] = value
        return node


def _chunks(part: _Part) -> list[list[fx.Node]]:
    """Return the nodes of a region, divided by the trunk's nodes between which they stand."""
    chunks: list[list[fx.Node]] = [[]]
    for node in part.program.graph.nodes:
        if node in part.region:
            chunks[-1].append(node)
        elif node.op != "output":
            chunks.append([])
    return chunks


def _holder(tensors: Mapping[str, torch.Tensor]) -> fx.GraphModule:
    """Return a graph module with tensors by name, and an empty graph."""
    module = fx.GraphModule({}, fx.Graph())
    for name, tensor in tensors.items():
        attach(module, name, tensor, persistent=True)
    return module


def _attach_constant(program: Program, node: fx.Node, module: nn.Module, target: str) -> None:
    """Register what a `get_attr` node reads, unless it is a tensor of the state."""
    name = str(node.target)
    if node.op == "get_attr" and name not in program.canonical:
        attach(module, target, program.tensor(name), persistent=False)
