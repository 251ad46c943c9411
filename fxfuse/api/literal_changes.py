"""What the numbers in a network's code became when its graph was written in another size."""

from __future__ import annotations

import operator
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from torch import fx

from fxfuse.graph.arguments import argument_names

#: Sizes of a shape; None where one is no number.
Shape = tuple[int | None, ...]


@dataclass
class Changes:
    """Numbers that changed in the operators of one module's own code.

    Attributes:
        named: New value of an operator's argument, by its name in the operator's schema; numbers
            and tuples of numbers. None where operators differ in it.
        sizes: For each number that changed, what it became, in the order of the graph.
        shapes: Lists of numbers that changed: before and after.
    """

    named: dict[str, int | tuple[int, ...] | None] = field(default_factory=dict)
    sizes: dict[int, list[int]] = field(default_factory=dict)
    shapes: list[tuple[Shape, Shape]] = field(default_factory=list)

    def size(self, before: int, after: int) -> None:
        """Note that a number became another one."""
        known = self.sizes.setdefault(before, [])
        if after not in known:
            known.append(after)

    def shape_of(self, before: Sequence[int]) -> tuple[int, ...] | None:
        """Return what some successive sizes became, if they are part of a list that changed."""
        wanted, count = tuple(before), len(before)
        for old, new in self.shapes:
            for start in range(len(old) - count + 1):
                part = new[start : start + count]
                whole = tuple(n for n in part if n is not None)
                if old[start : start + count] == wanted and len(whole) == count and whole != wanted:
                    return whole
        return None


def changes_of(before: fx.Graph, after: fx.Graph) -> dict[str, Changes]:
    """Compare a captured graph with the same graph, of the same names, in another size.

    Returns, for each module by dotted path, what changed in its own code (not in its submodules').
    """
    twins = {node.name: node for node in after.nodes}
    found: dict[str, Changes] = defaultdict(Changes)
    for node in before.nodes:
        twin = twins.get(node.name)
        if node.op != "call_function" or twin is None or twin.op != node.op:
            continue
        changes = found[_path_of(node)]
        for name, old, new in _arguments(node, twin):
            _note(changes, name, old, new)
            _note_multiples(changes, old, new)
    return found


def _path_of(node: fx.Node) -> str:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    # A module that is called again gets a number behind its path.
    return re.sub(r"@\d+$", "", stack[-1][0]) if stack else ""


def _arguments(node: fx.Node, twin: fx.Node) -> Iterator[tuple[str, Any, Any]]:
    names = argument_names(node.target) if node.target == twin.target else []
    for position, (old, new) in enumerate(zip(node.args, twin.args, strict=False)):
        yield names[position] if position < len(names) else "", old, new
    for name, old in node.kwargs.items():
        yield name if names else "", old, twin.kwargs.get(name, old)


def _note(changes: Changes, name: str, old: Any, new: Any) -> None:
    value: int | tuple[int, ...]
    if _is_number(old) and _is_number(new) and old != new:
        value = new
        changes.size(old, new)
    elif isinstance(old, list | tuple) and isinstance(new, list | tuple) and len(old) == len(new):
        shapes = tuple(tuple(x if _is_number(x) else None for x in s) for s in (old, new))
        if shapes[0] == shapes[1]:
            return
        changes.shapes.append((shapes[0], shapes[1]))
        for a, b in zip(*shapes, strict=True):
            if a is not None and b is not None and a != b:
                changes.size(a, b)
        if None in shapes[1]:
            return
        value = tuple(n for n in shapes[1] if n is not None)
    else:
        return
    if name:
        changes.named[name] = value if changes.named.get(name, value) == value else None


def _note_multiples(changes: Changes, old: Any, new: Any) -> None:
    """Note what became of the numbers by which sizes are multiplied: of heads, in `b * heads`."""
    pairs = zip(old, new, strict=False) if isinstance(old, list) and isinstance(new, list) else ()
    for a, b in pairs:
        if isinstance(a, fx.Node) and isinstance(b, fx.Node):
            (root, before), (other, after) = _multiple(a), _multiple(b)
            if root == other and before != after and {before.denominator, after.denominator} == {1}:
                changes.size(int(before), int(after))


def _multiple(node: fx.Node) -> tuple[str, Fraction]:
    """Return the name of the size that a node is a multiple of, and how many times it is it."""
    args: tuple[Any, ...] = node.args
    sizes = [arg for arg in args if isinstance(arg, fx.Node)]
    numbers = [arg for arg in args if _is_number(arg)]
    if len(sizes) == len(numbers) == 1 and node.target in (operator.mul, operator.floordiv):
        name, times = _multiple(sizes[0])
        if node.target is operator.mul:
            return name, times * numbers[0]
        if args[1] is numbers[0] and numbers[0]:
            return name, times / numbers[0]
    return node.name, Fraction(1)


def _is_number(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)
