"""Whether captured members are one network: the same graph, tensors and constants."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from fxfuse.errors import MemberError
from fxfuse.graph.capture import Program
from fxfuse.graph.example import first_line
from fxfuse.graph.run import answers
from fxfuse.graph.source_lines import where_of
from fxfuse.graph.tensors import is_constant, tensors_in
from fxfuse.graph.torch_compat import hint, pytree, schema_of

#: Names of the arguments of operators that may be a number of channels, heads or groups.
_SIZES = frozenset(
    {
        "end",
        "groups",
        "length",
        "normalized_shape",
        "num_groups",
        "size",
        "sizes",
        "shape",
        "split_size",
        "split_sizes",
        "start",
    }
)

#: Of these, those in which members may differ although all of their tensors have the same shape:
#: heads and groups are another number of units of another size then.
_VIEWS = frozenset({"num_groups", "shape", "size", "sizes"})


def check_same_network(members: Sequence[Program], *, any_width: bool = False) -> None:
    """Check that the members have one graph, the same tensors and the same constants.

    Members that were traced have other sizes in their graphs, so they are compared by what they
    answer: the first member's module with another member's weights has to answer as that member.

    Args:
        members: Program members.
        any_width: Whether members may have other sizes: shapes, and numbers in the graph. What the
            graph calculates with may be another number then, too, as the scale of heads of another
            size is; `fxfuse.analysis.multi_width` looks at which it is.
    """
    for number, other in enumerate(members[1:], start=1):
        check_same_as(members[0], other, number, any_width=any_width)


def check_same_as(first: Program, other: Program, number: int, *, any_width: bool = False) -> None:
    """Check that a member is the same network as the first one."""
    programs = first.is_exported and other.is_exported
    same_sizes = _check_tensors(first, other, number, any_width=any_width and programs)
    if programs:
        free = (_VIEWS if same_sizes else _SIZES) if any_width else frozenset()
        _check_graph(first, other, number, free)
    else:
        _check_answers(first, other, number)


def check_same_interface(members: Sequence[Program]) -> None:
    """Check that members of any architecture take the same inputs and return the same outputs.

    Batch sizes may differ; where an output is in a structure does not count.
    """
    wanted = _interface(members[0])
    for number, other in enumerate(members[1:], start=1):
        for what, ours, theirs in zip(
            ("inputs", "outputs"), wanted, _interface(other), strict=True
        ):
            if ours != theirs:
                raise MemberError(
                    f"member {number} differs from member 0: {what}",
                    where=f"member 0: {_shown(ours)}; member {number}: {_shown(theirs)}",
                    why="members of different architectures run on the same inputs, and what they "
                    "answer is combined",
                    how=f"wrap the networks so that their {what} are alike",
                )


def _interface(program: Program) -> tuple[list[Any], list[Any]]:
    """The inputs and the outputs: dtype and shape without the batch; numbers as they are."""
    inputs = [n.meta.get("val") for n in program.graph.nodes if n.op == "placeholder"]
    outputs = [n.meta.get("val") if isinstance(n, fx.Node) else n for n in program.outputs()]
    found = ([_described(value) for value in values] for values in (inputs, outputs))
    return next(found), next(found)


def _described(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return hint(value)
    return value.dtype, tuple(hint(size) for size in value.shape[1:]), value.dim()


def _shown(values: Sequence[Any]) -> str:
    tensors = (v for v in values if isinstance(v, tuple))
    shapes = [f"{str(dtype).removeprefix('torch.')} {['b', *rest]}" for dtype, rest, _ in tensors]
    return ", ".join(shapes).replace("'", "") or "no tensor"


def _mismatch(what: str, number: int, where: str, why: str) -> MemberError:
    return MemberError(
        f"member {number} differs from member 0: {what}",
        where=where,
        why=why,
        how="pass members of one architecture, built with the same arguments",
    )


def _check_tensors(first: Program, other: Program, number: int, *, any_width: bool) -> bool:
    """Tell whether all tensors have the same shape."""
    same_sizes = True
    for name in [*first.names, *(n for n in other.names if n not in first.canonical)]:
        if (name in other.canonical) != (name in first.canonical):
            owner = "member 0" if name in first.canonical else f"member {number}"
            raise _mismatch("tensor names", number, name, f"only {owner} has this tensor")
        ours, theirs = first.tensor(name), other.tensor(name)
        if ours.shape != theirs.shape:
            same_sizes = False
        if not same_sizes and not (any_width and ours.dim() == theirs.dim()):
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
    return same_sizes


def _check_answers(first: Program, other: Program, number: int) -> None:
    if first.source is None or other.source is None or first.is_exported != other.is_exported:
        raise _mismatch("capture", number, "", "only one of them can be exported")
    args, kwargs = other.example_inputs
    expected = answers(other.source, {}, args, kwargs)
    try:
        found = answers(first.source, other.once(other.state()), args, kwargs)
        # Leaves, since outputs may be of a type that only pytree knows.
        torch.testing.assert_close(
            *(tensors_in(y) for y in (found, expected)),
            equal_nan=True,
        )
    except Exception as error:
        differing = next(_differences(first, other, frozenset()), None)
        where = type(other.source).__name__ if differing is None else where_of(differing[0])
        raise _mismatch(
            "answers",
            number,
            where,
            f"member 0 with its weights returns other outputs: {first_line(error)}",
        ) from error


def check_constant(
    name: str, value: torch.Tensor, other: torch.Tensor, number: int, *, stored: bool
) -> None:
    """Check that a constant which the graph reads is the same in a member as in member 0."""
    if value.dtype == other.dtype and torch.equal(value, other):
        return
    why = f"a constant ({value.dtype}) that the graph reads has another value"
    if stored:
        why += "; integer tensors are constants, quantised weights too: fuse the "
        why += "floating-point networks and quantise the result"
    raise _mismatch("constants", number, name, why)


def _check_graph(first: Program, other: Program, number: int, free: frozenset[str]) -> None:
    differing = next(_differences(first, other, free), None)
    if differing is not None:
        a, b = differing
        why = f"{a.format_node()} vs {b.format_node()}"
        raise _mismatch("graphs", number, where_of(a), why)
    ours, theirs = list(first.graph.nodes), list(other.graph.nodes)
    for a, b in zip(ours, theirs, strict=False):
        if a.op == "get_attr" and _is_constant(first, str(a.target)):
            name, stored = str(a.target), str(a.target) in first.canonical
            value, value_other = first.tensor(name), other.tensor(str(b.target))
            check_constant(name, value, value_other, number, stored=stored)
    if len(ours) != len(theirs):
        raise _mismatch("graphs", number, "end of the graph", f"{len(ours)} vs {len(theirs)} nodes")


def _differences(
    first: Program, other: Program, free: frozenset[str]
) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Yield the nodes at the same place of two graphs that do something else."""
    ours, theirs = list(first.graph.nodes), list(other.graph.nodes)
    position = {node: index for index, node in enumerate(ours)}
    position_theirs = {node: index for index, node in enumerate(theirs)}
    for a, b in zip(ours, theirs, strict=False):
        if _signature(a, position, free) != _signature(b, position_theirs, free):
            yield a, b


def _is_constant(program: Program, target: str) -> bool:
    if target not in program.canonical:
        return True
    # Counters are data: a member that has run differs from one that has not.
    return is_constant(program.tensor(target)) and program.canonical[target] not in program.written


def _signature(
    node: fx.Node, position: Mapping[fx.Node, int], free: frozenset[str]
) -> tuple[Any, ...]:
    """Return what a node does to which nodes; sizes in arguments of these names do not count."""

    def plain(value: Any) -> Any:
        return fx.map_arg(value, lambda n: ("node", position[n]))

    target = node.target if node.op in ("get_attr", "call_function") else ""
    args, kwargs = list(node.args), dict(node.kwargs)
    schema = schema_of(node.target)
    if free and schema is not None:
        args, kwargs = pytree.tree_map_only(float, lambda _: "a number", (args, kwargs))
        for place, argument in enumerate(schema.arguments):
            if argument.name in free and place < len(args):
                args[place] = _unsized(args[place])
            elif argument.name in free and argument.name in kwargs:
                kwargs[argument.name] = _unsized(kwargs[argument.name])
    if free and schema is None and isinstance(node.meta.get("val"), torch.SymInt):
        # Arithmetic on sizes: a batch times a number of heads.
        args = _unsized(args)
    return (node.op, target, plain(tuple(args)), plain(kwargs))


def _unsized(value: Any) -> Any:
    return pytree.tree_map_only(int, lambda _: "a size", value)
