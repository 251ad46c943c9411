"""Hands layouts on: a result carries the neurons of its operands in their order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import fx

from fxfuse.analysis.labels import AbstractTensor
from fxfuse.analysis.rules import contraction, find, ordering, pointwise, reduction
from fxfuse.graph.arguments import argument, argument_names, set_argument
from fxfuse.transform.layout import Layout
from fxfuse.transform.resizing.literals import dimension
from fxfuse.transform.resizing.operands import agree, broadcast, spread
from fxfuse.transform.resizing.state import Layouts, ResizedGraph, cannot_write, has_tensor

aten = torch.ops.aten


def propagate_layouts(wide: ResizedGraph, node: fx.Node) -> Any:
    """Hand layouts over to whatever carries the same neurons in the same order."""
    known: dict[bytes, Layout] = {}
    _fill_factors(wide, node)
    operands = [n for n in node.all_input_nodes if has_tensor(wide.values[n])]
    for operand in operands:
        if operand.op == "get_attr":
            continue
        for dim, layout in wide.layouts[operand].items():
            key = wide.units.order(wide.values[operand], dim)
            if key is not None:
                agree(wide, node, operand, dim, layout, known.setdefault(key, layout))
                # A pool leaves the one unit of several dimensions along one of them.
                known.setdefault(wide.units.without_place(key), layout)
    for operand in operands:
        if operand.op != "get_attr":
            continue
        for dim, place in wide.parameter_places(operand):
            key = wide.units.order(wide.values[operand], dim)
            if key is None:
                continue
            if place not in wide.places and key in known:
                wide.places[place] = known[key]
            layout = wide.place_layout(place)
            agree(wide, node, operand, dim, layout, known.setdefault(key, layout))
    value = wide.values[node]
    if isinstance(value, list):
        return [_handed(wide, node, part, known) for part in value]
    result = _handed(wide, node, value, known)
    _check_grown(wide, node, result)
    if find(node.target) is contraction.addmm:
        broadcast(wide, node, operands[:1], result)
    elif find(node.target) is contraction.attention:
        # The mask has the heads in common with the result, and nothing behind them.
        mask = argument(node, "attn_mask")
        heads = {d: layout for d, layout in result.items() if d < value.rank - 2}
        broadcast(wide, node, [mask] if isinstance(mask, fx.Node) else [], heads)
    elif find(node.target) is pointwise.pointwise or pointwise.is_pointwise(node.target):
        broadcast(wide, node, operands, result)
    return result


def _fill_factors(wide: ResizedGraph, node: fx.Node) -> None:
    """Give factors that are alike for all neurons of a letter as many places as there are.

    A constant that sums neurons, say, or the one head of keys that all heads of queries read.
    """
    operands = _with_letters(wide, node)
    filled: set[tuple[fx.Node, int]] = set()
    for operand, letters in operands:
        for dim, layout in wide.layout_of(operand).items():
            size = wide.values[operand].shape[dim]
            for other, own in operands:
                place, value = own.find(letters[dim]), wide.values[other]
                if place < 0 or (other, place) in filled or value.shape[place] != size:
                    continue
                if not any(place in f.dims for f in value.fields):
                    filled.add((other, place))
                    spread(wide, node, other, place, layout)
                elif _stays(wide, other, place) and layout.size != size:
                    raise cannot_write(node, "only one of two operands grows where they meet")


def _check_grown(wide: ResizedGraph, node: fx.Node, result: Layouts) -> None:
    """Check that where neurons stand, a dimension grows in the result and in all operands, or none.

    A matrix that is one unit stands along two dimensions, and grows along one of them.
    """
    for operand, dims in _origins(wide, node):
        known, shape = wide.layout_of(operand), wide.values[operand].shape
        for dim, place in enumerate(dims):
            layout = result.get(dim) or known.get(place)
            if place < 0 or layout is None or layout.size == shape[place] or shape[place] == 1:
                continue
            if dim not in result or _stays(wide, operand, place):
                raise cannot_write(node, "a unit of it grows along another dimension")


def _origins(wide: ResizedGraph, node: fx.Node) -> list[tuple[fx.Node, list[int]]]:
    """For each operand, its dimension that becomes each one of the result, negative for none.

    Empty where the operator does not show it.
    """
    rule, rank = find(node.target), wide.values[node].rank
    if rule is pointwise.pointwise or pointwise.is_pointwise(node.target):
        operands = [n for n in node.all_input_nodes if has_tensor(wide.values[n])]
        starts = [wide.values[n].rank - rank for n in operands]
        return [(n, list(range(i, i + rank))) for n, i in zip(operands, starts, strict=True)]
    if rule is reduction.reduce:
        operand = cast("fx.Node", node.args[0])
        own = wide.values[operand].rank
        given = argument(node, "dim")
        named = [given] if isinstance(given, int) else given
        over = {d % own for d in named} if named else set(range(own))
        keeps = bool(argument(node, "keepdim"))
        left = [-1 if d in over else d for d in range(own) if keeps or d not in over]
        return [(operand, left)]
    terms = _with_letters(wide, node)
    if rule is contraction.matmul and all(len(own) > 1 for _, own in terms):
        out = _behind(rank, "to")
    elif rule is contraction.linear:
        out = terms[0][1][:-1] + "o"
    elif rule is contraction.einsum and "->" in str(node.args[0]):
        out = contraction.spelled(str(node.args[0]).replace(" ", "").partition("->")[2], rank)
    else:
        return []
    return [(operand, [own.find(letter) for letter in out]) for operand, own in terms]


def _stays(wide: ResizedGraph, operand: fx.Node, dim: int) -> bool:
    """Tell whether neurons of an activation are as many along a dimension as in a member."""
    labelled = any(dim in f.dims for f in wide.values[operand].fields)
    return labelled and operand.op != "get_attr" and dim not in wide.layout_of(operand)


def _with_letters(wide: ResizedGraph, node: fx.Node) -> list[tuple[fx.Node, str]]:
    """Return the operands of a product, and a letter for each of their dimensions."""
    rule, args = find(node.target), node.args
    if rule is contraction.einsum:
        factors = cast("Sequence[fx.Node]", args[1])
        terms = str(args[0]).replace(" ", "").partition("->")[0].split(",")
        ranks = [wide.values[factor].rank for factor in factors]
        letters = [contraction.spelled(t, r) for t, r in zip(terms, ranks, strict=True)]
        return list(zip(factors, letters, strict=True))
    if rule in (contraction.linear, contraction.addmm, contraction.matmul):
        first = int(rule is contraction.addmm)
        letters = ["ti", "oi" if rule is contraction.linear else "io"]
    elif rule is contraction.attention:
        first, letters = 0, ["td", "sd", "se"]
    else:
        return []
    operands = list(cast("Sequence[fx.Node]", args[first : first + len(letters)]))
    mask = argument(node, "attn_mask") if rule is contraction.attention else None
    if isinstance(mask, fx.Node):
        operands, letters = [*operands, mask], [*letters, "ts"]
    return [
        (operand, _behind(wide.values[operand].rank, own))
        for operand, own in zip(operands, letters, strict=True)
    ]


def _behind(rank: int, letters: str) -> str:
    """Return the letters of a matrix behind those of leading dimensions; a vector has one."""
    return "i" if rank == 1 else "FEDCBA"[8 - rank :] + letters


def _handed(
    wide: ResizedGraph, node: fx.Node, value: AbstractTensor, known: Mapping[bytes, Layout]
) -> Layouts:
    """Return the layouts of a result that carries the neurons of operands."""
    result: Layouts = {}
    for dim in range(value.rank):
        key = wide.units.order(value, dim)
        if key is not None and key in known:
            result[dim] = known[key]
    return complete(wide, node, value, result)


def complete(wide: ResizedGraph, node: fx.Node, value: AbstractTensor, result: Layouts) -> Layouts:
    """Return the layouts of a result, once it is sure that none is missing."""
    for f in value.fields:
        grows = bool((wide.units.free_units(f) >= 0).any())
        if grows and not set(f.dims) & set(result):
            raise cannot_write(node, "no operand tells the order of its neurons")
    return result


def resize_fill(wide: ResizedGraph, node: fx.Node) -> Layouts:
    """Give a fill the shape that its operand has in a member: where no neuron is, nothing grows."""
    if "size" in argument_names(node.target):
        return {}
    operand = cast("fx.Node", node.args[0])
    layouts = wide.layout_of(operand)
    sizes: list[int] = [-1] * wide.values[operand].rank
    for dim in layouts:
        if not isinstance(operand.meta["val"].shape[dim], int):
            raise cannot_write(node, "neurons are in another order in every sample")
        sizes[dim] = operand.meta["val"].shape[dim]
    if layouts:
        one = wide.current(node, operand)
        with wide.graph.inserting_before(wide.mapping[node]):
            for dim in layouts:
                one = wide.graph.call_function(aten.slice.Tensor, (one, dim, 0, 1))
            one = wide.graph.call_function(aten.expand.default, (one, sizes))
        wide.reroute(node, operand, one)
    return {}


def keep_layout(wide: ResizedGraph, node: fx.Node) -> Layouts:
    """Resize operators whose result stands as their operand does."""
    operand = cast("fx.Node", node.args[0])
    if operand in wide.pending:
        source, move, passed = wide.pending[operand]
        wide.pending[node] = source, move, (*passed, node)
    return wide.layout_of(node.args[0])


def resize_chosen(wide: ResizedGraph, node: fx.Node) -> Layouts:
    """Resize operators that choose or sort among units: how many they return is no unit's size."""
    value: AbstractTensor = wide.values[cast("fx.Node", node.args[0])]
    layout = wide.layout_of(node.args[0]).get(dimension(node, value.rank))
    counts = "k" in argument_names(node.target)
    if layout is not None and not counts and find(node.target) is ordering.ranked:
        raise cannot_write(node, "it returns one value for each unit")
    if layout is not None and counts and argument(node, "k") > layout.size:
        raise cannot_write(node, "it needs more units than there are")
    return cast("Layouts", propagate_layouts(wide, node))


def resize_normalisation(wide: ResizedGraph, node: fx.Node) -> Layouts:
    """Resize normalisation of the last dimensions: the normalised shape is a literal that grows."""
    result: Layouts = propagate_layouts(wide, node)
    value: AbstractTensor = wide.values[node]
    shape = list(argument(node, "normalized_shape"))
    first = value.rank - len(shape)
    for dim, layout in result.items():
        if dim >= first:
            shape[dim - first] = layout.size
    set_argument(wide.mapping[node], "normalized_shape", shape)
    return result
