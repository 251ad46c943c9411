"""Data movement: it runs on positions, with every candidate for its literals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import fx

from fxfuse.analysis.labels import AbstractTensor
from fxfuse.analysis.rules import find, selection
from fxfuse.graph.torch_compat import pytree
from fxfuse.transform.layout import Layout
from fxfuse.transform.resizing.gather import gather
from fxfuse.transform.resizing.literals import candidates, dimension, evaluate, set_arguments
from fxfuse.transform.resizing.operands import reorder, spread
from fxfuse.transform.resizing.positions import layouts_of, positions_of
from fxfuse.transform.resizing.propagate import complete, propagate_layouts
from fxfuse.transform.resizing.state import Layouts, ResizedGraph, as_list, cannot_write, has_tensor

aten = torch.ops.aten


def move(wide: ResizedGraph, node: fx.Node) -> Any:
    """Views, permutations, slices and the like; what no literals describe becomes a gather."""
    source = cast("fx.Node", node.args[0])
    value: AbstractTensor = wide.values[source]
    layouts = wide.layout_of(source)
    if source in wide.pending:
        return gather(wide, node, source, layouts)
    if not layouts:
        return pytree.tree_map(
            lambda _: {}, wide.values[node], is_leaf=lambda x: isinstance(x, AbstractTensor)
        )
    if _splits_by_data(node) and dimension(node, value.rank) not in layouts:
        return [dict(layouts) for _ in wide.values[node]]
    narrow = as_list(evaluate(wide, node, node.args, positions_of(value, {})[0]))
    growing = [
        [dim for dim in range(part.rank) if wide.units.order(part, dim) is not None]
        for part in as_list(wide.values[node])
    ]
    # The order that the operand happens to have, else one in which copies stand together.
    for ordered in ({}, *_reorderings(wide, value, layouts)):
        tried = {**layouts, **ordered}
        place, copy = positions_of(value, tried)
        for args in candidates(wide, node, value, tried):
            try:
                moved = as_list(evaluate(wide, node, args, place))
                copies = as_list(evaluate(wide, node, args, copy))
            except (IndexError, RuntimeError):
                # These sizes do not fit: the next candidate.
                continue
            if len(moved) != len(narrow):
                continue
            found = [layouts_of(*p) for p in zip(narrow, moved, copies, growing, strict=True)]
            if _keeps_units_apart(wide, node, found):
                set_arguments(wide, node, args)
                reorder(wide, node, layouts, ordered)
                return found if isinstance(wide.values[node], list) else found[0]
    return gather(wide, node, source, layouts)


def _splits_by_data(node: fx.Node) -> bool:
    """Tell whether the sizes of parts are known when the network runs only."""
    return node.target is aten.split_with_sizes.default and any(
        isinstance(size, fx.Node) for size in cast("Sequence[Any]", node.args[1])
    )


def index(wide: ResizedGraph, node: fx.Node) -> Any:
    """Indexing: by constants it moves data, by data it picks from dimensions without neurons."""
    nodes = [x for x in pytree.tree_leaves(node.args[1:]) if isinstance(x, fx.Node)]
    values = [wide.values[x] for x in nodes]
    if all(v.constant is not None for v in values if isinstance(v, AbstractTensor)):
        return move(wide, node)
    return propagate_layouts(wide, node)


def resize_gather(wide: ResizedGraph, node: fx.Node) -> Layouts:
    """Gathering: the index names one place for each element, so it grows as its operand does."""
    x, chosen = cast("fx.Node", node.args[0]), cast("fx.Node", node.args[2])
    if wide.values[chosen].constant is not None:
        return cast("Layouts", move(wide, node))
    result: Layouts = {**wide.layout_of(chosen), **wide.layout_of(x)}
    for dim, layout in result.items():
        if wide.values[x].shape[dim] != wide.values[chosen].shape[dim]:
            raise cannot_write(node, "it takes a part of the neurons only")
        for operand in (x, chosen):
            spread(wide, node, operand, dim, layout, broadcasts=False)
    return complete(wide, node, wide.values[node], result)


def resize_written(wide: ResizedGraph, node: fx.Node) -> Layouts:
    """Writing at places: what is written to, and an index for each element, grow with the rest."""
    result = cast("Layouts", propagate_layouts(wide, node))
    value: AbstractTensor = wide.values[node]
    # The values that are put at an index have dimensions of their own.
    operands = node.all_input_nodes[:1] if find(node.target) is selection.write else node.args
    for operand in operands:
        if isinstance(operand, fx.Node) and has_tensor(wide.values[operand]):
            known, own = wide.layout_of(operand), wide.values[operand]
            for dim, layout in result.items():
                if own.rank == value.rank and dim not in known and own.shape[dim] > 1:
                    spread(wide, node, operand, dim, layout)
    return result


def _keeps_units_apart(wide: ResizedGraph, node: fx.Node, found: Sequence[Layouts | None]) -> bool:
    """Tell whether the results hold every copy of whole units, and grow where units differ."""
    return all(
        layouts is not None
        and all(_holds_every_copy(wide, value, dim, lay) for dim, lay in layouts.items())
        for value, layouts in zip(as_list(wide.values[node]), found, strict=True)
    )


def _holds_every_copy(wide: ResizedGraph, value: AbstractTensor, dim: int, layout: Layout) -> bool:
    units = wide.units.along(value, dim)
    if units is None or wide.units.order(value, dim) is None:
        return False
    # An index into the members' units reaches some of the copies only. Of a constant among units,
    # which does not grow by itself, there may be as many as of these.
    copies = np.bincount(layout.source, minlength=len(units))
    return bool((copies >= np.where(wide.units.grow(units), wide.units.count[units], 1)).all())


def _reorderings(wide: ResizedGraph, value: AbstractTensor, layouts: Layouts) -> Iterator[Layouts]:
    """Yield layouts in which the copies of an index, or of a run of a unit's, stand together."""
    yield {dim: layout.by_index() for dim, layout in layouts.items()}
    blocks: Layouts = {}
    for dim, layout in layouts.items():
        units = wide.units.along(value, dim)
        if units is None:
            return
        run = np.cumsum(np.r_[0, units[1:] != units[:-1]])
        by_run = np.lexsort((layout.source, layout.copy, run[layout.source]))
        blocks[dim] = Layout(layout.source[by_run], layout.copy[by_run])
    yield blocks
    for dim, layout in layouts.items():
        for size in range(2, value.shape[dim]):
            if value.shape[dim] % size == 0:
                yield {dim: layout.by_block(size)}
