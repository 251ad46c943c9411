"""Operators that a saved graph may call, by name: an allow list."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from inspect import signature
from typing import Any

import torch
from torch import fx

from fxfuse.graph.arguments import argument_names
from fxfuse.graph.fixed_batch import check_batch
from fxfuse.graph.torch_compat import is_operator, pytree, registered_operators, schema_of


def count_batch(counter: torch.Tensor, training: bool) -> None:
    """Count a batch in training, as `nn.BatchNorm` does; the rewriter puts it into graphs."""
    if training:
        counter.add_(1)


#: Operator libraries of torch that any graph may use.
LIBRARIES = ("aten", "prims")

#: Operators that reach outside the process, or build tensors of parts that they do not check.
_DENIED = re.compile(r"aten::(from_file|_print|\w*(sparse|nested|jagged|fbgemm)\w*)(\.\w+)?")

#: What torch.export and the rewriter call on sizes.
_ON_SIZES: tuple[Any, ...] = (
    *(operator.add, operator.sub, operator.mul, operator.floordiv, operator.truediv),
    *(operator.mod, operator.pow, operator.neg, operator.pos, operator.lshift, operator.rshift),
    *(operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge),
    *(operator.and_, operator.or_, operator.not_, math.ceil, math.floor, math.trunc),
    *(torch.sym_int, torch.sym_float, torch.sym_max, torch.sym_min, torch.sym_not),
    *(torch.sym_ite, torch.sym_sum),
)
#: What makes large numbers of small ones, and by how much sizes let them.
_GROWING, _EXPONENTS = (operator.pow, operator.lshift), range(-64, 65)
#: Bits of a size, and most bits of what is computed of sizes: of a product of 64 of them.
_SIZE_BITS, _MOST_BITS = 64, 4096
#: Arguments whose literals decide how many elements a tensor has, and most elements.
_SIZES = re.compile(
    r"\w*size|\w*shape|repeats|pad|steps|end|n|m|s|row|col|num_\w+|length|window_length|minlength"
)
_ELEMENTS = 1 << 31
_FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    **{f"{f.__module__.lstrip('_')}.{f.__name__}": f for f in (*_ON_SIZES, operator.getitem)},
    **{"getattr": getattr, "fxfuse.count_batch": count_batch, "fxfuse.check_batch": check_batch},
}
_NAMES = {function: name for name, function in _FUNCTIONS.items()}


def name_of(target: Any) -> str | None:
    """Return the name of an operator in a file; None where it has none."""
    return str(target) if is_operator(target) else _NAMES.get(target)


def find_operator(name: str, registered: Collection[str]) -> Callable[..., Any] | None:
    """Return the operator that `name_of` names so; None where the list does not allow it."""
    library, _, rest = name.partition(".")
    packet, _, overload = rest.partition(".")
    qualified = f"{library}::{packet}" + ("" if overload == "default" else f".{overload}")
    if overload and qualified in registered:
        # Only names that torch itself lists get here, so no other attribute can be reached.
        found: Callable[..., Any] = getattr(getattr(getattr(torch.ops, library), packet), overload)
        return found
    return _FUNCTIONS.get(name)


def registered_in(libraries: Collection[str] | None) -> frozenset[str]:
    """Return qualified names of the operators of libraries, of all if None, without denied ones."""
    found = (name for name in registered_operators() if not _DENIED.fullmatch(name))
    return frozenset(n for n in found if libraries is None or n.partition("::")[0] in libraries)


def is_call(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Tell whether a function is called as torch.export and the rewriter call it.

    Arguments of operators are for torch to check, when the graph is run.
    """
    if is_operator(target):
        return True
    kinds = [type(argument) for argument in args]
    if kwargs or (fx.Node not in kinds and target is not torch.sym_sum):
        return False
    if target is getattr:
        return kinds == [fx.Node, str] and args[1] == "device"
    if target is count_batch:
        return kinds == [fx.Node, fx.Node]
    if target is check_batch:
        return kinds == [fx.Node, int, str]
    if target is operator.getitem:
        return kinds == [fx.Node, int]
    # torch.fx writes the operands of an operator into its sign, and counts on their number.
    if len(args) != len(signature(target).parameters):
        return False
    if target in _GROWING and args[1] not in _EXPONENTS:
        # How far it grows would be known only when the graph is run.
        return target is operator.pow and isinstance(args[1], float)
    return all(
        isinstance(leaf, int | float) or (isinstance(leaf, fx.Node) and not _is_list(leaf))
        for leaf in pytree.tree_leaves(list(args))
    )


def excess(node: fx.Node, bits: dict[fx.Node, int]) -> str:
    """Return what is without bounds in a call that `is_call` allows, or "".

    That is the elements that literals ask for, and the bits of numbers that are computed of sizes.
    `bits` holds those of earlier nodes, and gets those of this one. All others have the bits of a
    size: tensors, too, of which the same operators compute tensors.
    """
    target: Any = node.target
    args: Any = node.args
    if is_operator(target) and _literal_elements(target, args, node.kwargs) > _ELEMENTS:
        return f"asks for more than {_ELEMENTS:,} elements"
    if target not in _ON_SIZES:
        return ""
    found = [_bits(leaf, bits) for leaf in pytree.tree_leaves(list(args))]
    if target is operator.mul:
        most = sum(found)
    elif target is operator.pow:
        most = found[0] * max(1, math.ceil(min(abs(args[1]), _MOST_BITS)))
    elif target is operator.lshift:
        most = found[0] + abs(args[1])
    else:
        # A sum has as many bits as the largest part, and those of the number of parts.
        most = max(found) + len(found).bit_length()
    bits[node] = max(most, _SIZE_BITS)
    return f"computes a number of more than {_MOST_BITS:,} bits" if most > _MOST_BITS else ""


def _bits(value: Any, bits: Mapping[fx.Node, int]) -> int:
    return value.bit_length() if isinstance(value, int) else bits.get(value, _SIZE_BITS)


def _is_list(node: fx.Node) -> bool:
    """Tell whether a node is a list: sums and multiples of these are longer lists."""
    schema = schema_of(node.target)
    returns = () if schema is None else schema.returns
    return len(returns) > 1 or any(isinstance(told.type, torch.ListType) for told in returns)


def _literal_elements(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> float:
    """Return how many elements the literal sizes among an operator's arguments ask for."""
    count = 1.0
    for name, value in {**dict(zip(argument_names(target), args, strict=False)), **kwargs}.items():
        # The end of a slice is no size; that of a range is one.
        if _SIZES.fullmatch(name) and (name != "end" or "range" in str(target)):
            sizes = [v for v in pytree.tree_leaves(value) if isinstance(v, int | float) and v]
            count *= math.prod(abs(float(size)) for size in sizes)
    return count
