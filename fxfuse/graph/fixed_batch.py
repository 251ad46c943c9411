"""A network that was captured with a batch of one size answers no other.

`torch.export` writes sizes that it could not keep open into the graph as numbers; with another
batch such a graph may run all the same, and answer wrongly.
"""

from __future__ import annotations

import builtins
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx

from fxfuse.errors import InputError
from fxfuse.graph.source_lines import source_of_caller


@fx.has_side_effect
def check_batch(value: torch.Tensor, size: int, name: str) -> None:
    """Check the size of an input's first dimension, where the graph calls it."""
    if value.shape[0] != size:
        raise InputError(
            f"the batch size must be {size}, got {value.shape[0]}",
            where=f"input {name}",
            why=f"the example had a batch of {size}, and torch.export could not keep the batch "
            "dimension dynamic",
            how=f"pass {size} at a time; or write x.shape[0] in forward where it says "
            "int(x.shape[0]), and numbers of the example where they stand for the batch, and fuse "
            "again",
        )


@contextmanager
def open_sizes() -> Iterator[list[str]]:
    """While a network is exported, let `len` of a tensor stay symbolic.

    Python makes a number of whatever `__len__` returns, so `len` itself is replaced; it answers as
    before to all but tensors with symbolic sizes.

    Yields:
        The lines of the user's code, noted as they ask for a symbolic size as a number.
    """
    asked: list[str] = []
    before = builtins.len, torch.SymInt.__int__, torch.SymInt.__index__

    def length(value: Any) -> Any:
        is_batch = isinstance(value, torch.Tensor) and value.dim()
        return value.shape[0] if is_batch else before[0](value)

    def number(size: torch.SymInt) -> int:
        asked.append(source_of_caller())
        return before[1](size)

    def put(*functions: Any) -> None:
        for owner, name, function in zip(
            (builtins, torch.SymInt, torch.SymInt),
            ("len", "__int__", "__index__"),
            functions,
            strict=True,
        ):
            setattr(owner, name, function)

    put(length, number, number)
    try:
        yield asked
    finally:
        put(*before)


def batch_sizes(graph: fx.Graph) -> dict[str, int | torch.SymInt]:
    """The first dimension of each tensor input, by its name; symbolic where it is kept open."""
    inputs = ((n.name, n.meta.get("val")) for n in graph.nodes if n.op == "placeholder")
    return {n: v.shape[0] for n, v in inputs if isinstance(v, torch.Tensor) and v.dim()}


def fixed_sizes(graph: fx.Graph) -> dict[str, int]:
    """Return the `batch_sizes` of a graph, if all of them are fixed; else nothing."""
    sizes = batch_sizes(graph)
    fixed = {name: size for name, size in sizes.items() if isinstance(size, int)}
    return fixed if len(fixed) == len(sizes) else {}


def check_sizes(graph: fx.Graph, sizes: Mapping[str, int]) -> None:
    """Write a check of each input into a graph, before anything is computed."""
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    for node in reversed(inputs):
        if node.name in sizes:
            with graph.inserting_after(inputs[-1]):
                graph.call_function(check_batch, (node, sizes[node.name], node.name))


def uncheck_sizes(graph: fx.Graph) -> dict[str, int]:
    """Take `check_sizes` back, and return the sizes that it checked, by input."""
    checks = [node for node in graph.nodes if node.target is check_batch]
    sizes = {str(node.args[2]): node.args[1] for node in checks}
    for node in checks:
        graph.erase_node(node)
    return sizes
