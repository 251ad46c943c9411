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

from fxfuse.graph.fixed_batch import check_batch
from fxfuse.graph.torch_compat import is_operator, pytree, registered_operators


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
    """Tell whether a function of Python is called as torch.export and the rewriter call it.

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
    if target in _GROWING and isinstance(args[1], int) and args[1] not in _EXPONENTS:
        return False
    leaves = pytree.tree_leaves(list(args))
    return all(isinstance(leaf, fx.Node | int | float) for leaf in leaves)
