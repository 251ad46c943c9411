"""Reading and writing at places that the data decide: labels along the other dimensions stay.

Where data go along an indexed dimension is not known, so labels along it freeze. Along the other
dimensions the operator is the same for every index: it runs on the ids, which have size 1 along the
indexed dimensions, with an index of zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial, reduce
from typing import Any

import torch
from torch import fx

from fxfuse.analysis.labels import AbstractTensor, DimLabels, positions, sources_of
from fxfuse.analysis.rules.algebra import align, meet, only_unlabelled
from fxfuse.analysis.rules.movement import run_on_ids
from fxfuse.analysis.rules.registry import Call, concrete_shape, rule
from fxfuse.graph.torch_compat import pytree, schema_of

aten = torch.ops.aten

_WHY = "indexed by data: which neuron stands where is not known"

#: Zeros for each index of an advanced indexing, None for dimensions that are taken whole.
Zeros = list[torch.Tensor | None]


@rule(aten.index.Tensor)
def index(call: Call) -> Any:
    """`x[index]`: constants move data."""
    if _is_constant(call):
        return run_on_ids(call, call.node.target)
    x: AbstractTensor = call.args[0]
    zeros = _zeros(call, x.rank)
    if zeros is None:
        return NotImplemented
    call.coupling.record_use(x)
    indexed = _indexed(zeros)
    x = only_unlabelled(call.coupling, x, indexed, _WHY)
    _freeze_index(call)

    def move(fields: tuple[DimLabels, ...]) -> tuple[DimLabels, ...]:
        return tuple(_field(aten.index.Tensor(f.ids, zeros)) for f in fields)

    shape, fields = call.shape, move(x.fields)
    content = move(positions(x.shape, x.unlabelled - indexed))
    kept = {d for f in (*fields, *content) for d in f.dims}
    picked = set(range(len(shape))) - kept
    return AbstractTensor(
        shape, fields, (*content, *positions(shape, picked)), sources_of(call.values())
    )


@rule(aten.index_select.default)
def index_select(call: Call) -> Any:
    """`index` along one dimension: constants move data."""
    if _is_constant(call):
        return run_on_ids(call, call.node.target)
    x, dim, chosen = call.args[0], call.args[1] % call.args[0].rank, call.args[2]
    only_unlabelled(call.coupling, chosen, range(chosen.rank), "used as an index")
    return replace(_picked(call, x, dim, call.shape), sources=sources_of(call.values()))


@rule(aten.take_along_dim.default)
def take(call: Call) -> Any:
    """As `gather`, with operands that broadcast along the other dimensions."""
    x, chosen, dim = call.args[0], call.args[1], call.argument("dim")
    if dim is None:
        return NotImplemented
    call.coupling.record_use(x)
    dim %= x.rank
    x = only_unlabelled(call.coupling, x, [dim], _WHY)
    met = meet(call.coupling, x.moved(lambda t: t.narrow(dim, 0, 1)), chosen)
    shape = call.shape
    varying = positions(shape, met.unlabelled | {dim})
    return replace(met, shape=shape, positions=varying, sources=sources_of(call.values()))


@rule(aten.gather.default)
def gather(call: Call) -> Any:
    """`x[i, index[i, j]]` along one dimension: the others meet those of the index."""
    if _is_constant(call):
        return run_on_ids(call, call.node.target)
    x, dim, chosen = call.args[0], call.args[1] % call.args[0].rank, call.args[2]
    met = meet(call.coupling, _picked(call, x, dim, chosen.shape), chosen)
    return replace(met, shape=call.shape, sources=sources_of(call.values()))


def _picked(call: Call, x: AbstractTensor, dim: int, shape: tuple[int, ...]) -> AbstractTensor:
    """Return the labels of x, none along a dimension of which it is not known what is picked."""
    call.coupling.record_use(x)
    x = only_unlabelled(call.coupling, x, [dim], _WHY)

    def cut(t: torch.Tensor) -> torch.Tensor:
        ranges = [slice(0, 1 if d == dim else size) for d, size in enumerate(shape)]
        return t[tuple(ranges)].expand(shape)

    picked = x.moved(cut)
    return replace(picked, positions=(*picked.positions, *positions(shape, [dim])))


@rule(aten.index_put.default, aten.index_put_.default)
def write(call: Call) -> Any:
    """`x[index] = values`: along dimensions that are not indexed, both are tied."""
    x, values = call.args[0], call.args[2]
    zeros = _zeros(call, x.rank)
    if zeros is None:
        return NotImplemented
    indexed = _indexed(zeros)
    x = only_unlabelled(call.coupling, x, indexed, _WHY)
    _freeze_index(call)
    # Sizes that tell dimensions apart show where each of them is in x[index].
    sizes = [1 if d in indexed else d + 2 for d in range(x.rank)]
    picked = aten.index.Tensor(torch.empty(1).expand(sizes), zeros)
    place = {size - 2: at for at, size in enumerate(picked.shape) if size > 1}
    values = align(values, picked.dim())
    scattered = set(range(picked.dim())) - set(place.values())
    values = only_unlabelled(call.coupling, values, scattered, _WHY)
    for operand in (x, values):
        call.coupling.record_use(operand)
        if sources_of(call.values()) is None:
            for f in operand.fields:
                call.coupling.role(operand, f, reader=False)

    def scatter(fields: tuple[DimLabels, ...]) -> tuple[DimLabels, ...]:
        return tuple(_field(f.ids.permute(order).reshape(shape_in_x(f.ids.shape))) for f in fields)

    def shape_in_x(shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(shape[place[d]] if d in place else 1 for d in range(x.rank))

    order = [place[d] for d in sorted(place)] + sorted(scattered)
    content = scatter(positions(values.shape, values.unlabelled - scattered))
    written = AbstractTensor(
        shape_in_x(values.shape), scatter(values.fields), content, values.sources
    )
    met = meet(call.coupling, x, written)
    varying = positions(x.shape, met.unlabelled | indexed)
    return replace(
        met, shape=x.shape, positions=varying, sources=sources_of(call.values()), constant=None
    )


@rule(
    aten.index_add.default,
    aten.index_add_.default,
    aten.index_copy.default,
    aten.index_copy_.default,
    aten.index_reduce.default,
    aten.index_reduce_.default,
    aten.index_fill.int_Scalar,
    aten.index_fill_.int_Scalar,
    aten.index_fill.int_Tensor,
    aten.index_fill_.int_Tensor,
)
def write_rows(call: Call) -> AbstractTensor:
    """`x[:, index] += source` along one dimension: along the others, both are tied."""
    x, dim, chosen = call.args[0], call.args[1] % max(call.args[0].rank, 1), call.args[2]
    only_unlabelled(call.coupling, chosen, range(chosen.rank), "used as an index")
    return _scattered(call, {dim}, [x, *call.values()[2:]])


@rule(
    aten.scatter.src,
    aten.scatter_.src,
    aten.scatter.value,
    aten.scatter_.value,
    aten.scatter.reduce,
    aten.scatter_.reduce,
    aten.scatter.value_reduce,
    aten.scatter_.value_reduce,
    aten.scatter_add.default,
    aten.scatter_add_.default,
    aten.scatter_reduce.two,
    aten.scatter_reduce_.two,
)
def scatter(call: Call) -> AbstractTensor:
    """`x[index[i, j], j] = source[i, j]` along one dimension: along the others, all are tied."""
    x, chosen = call.args[0], call.args[2]
    over = {call.args[1] % max(x.rank, 1)}
    # What is written in part along a dimension has to stay in order there.
    over |= {d for d in range(x.rank) if chosen.shape[d] != x.shape[d]}

    def cut(t: torch.Tensor) -> torch.Tensor:
        return t[tuple(slice(0, size) for size in chosen.shape)]

    sources = [v.moved(cut) if v.rank == x.rank else v for v in call.values()[2:]]
    return _scattered(call, over, [x, chosen, *sources])


def _scattered(call: Call, over: set[int], operands: list[AbstractTensor]) -> AbstractTensor:
    """Tie operands along all dimensions but `over`, along which the data decide who meets whom."""
    depends_on_input = sources_of(call.values()) is None
    rows = []
    for place, given in enumerate(operands):
        call.coupling.record_use(given, min(place, 1))
        value = only_unlabelled(call.coupling, given, over & set(range(given.rank)), _WHY)
        if depends_on_input:
            for f in value.fields:
                call.coupling.role(value, f, reader=False)
        # Without what varies along `over`, a row stands for all.
        row = value.moved(lambda t: t[tuple(_first_row(d, over) for d in range(t.dim()))])
        rows.append(align(row, operands[0].rank))
    met = reduce(partial(meet, call.coupling), rows)
    if schema_of(call.node.target).name.removesuffix("_") not in _LINEAR:
        for f in met.fields:
            call.coupling.mix("an averaged activation passes a nonlinear operator", ids=f)
    shape = call.shape
    return replace(
        met,
        shape=shape,
        positions=positions(shape, met.unlabelled | over),
        sources=sources_of(call.values()),
        constant=None,
    )


def _first_row(dim: int, over: set[int]) -> slice:
    return slice(0, 1) if dim in over else slice(None)


#: The mean of the members passes these.
_LINEAR = {"aten::index_add", "aten::index_copy", "aten::scatter_add"}


@rule(aten.segment_reduce.default)
def segments(call: Call) -> AbstractTensor:
    """Rows that follow each other are reduced to one; the other dimensions pass."""
    x: AbstractTensor = call.args[0]
    call.coupling.record_use(x)
    axis = call.argument("axis") % x.rank
    for other in call.values()[1:]:
        only_unlabelled(call.coupling, other, range(other.rank), "used as an index")
    x = only_unlabelled(call.coupling, x, [axis], _WHY)
    if call.argument("reduce") not in ("sum", "mean"):
        for f in x.fields:
            call.coupling.mix("an averaged activation passes a nonlinear operator", ids=f)
    sources, shape = sources_of(call.values()), call.shape
    varying = positions(shape, x.unlabelled | {axis})
    return replace(x, shape=shape, positions=varying, sources=sources, constant=None)


@rule(aten.searchsorted.Tensor, aten.bucketize.Tensor)
def search(call: Call) -> Any:
    """Each value is looked up by itself, in one row for all or in a row of its own."""
    is_bucketize = call.node.target is aten.bucketize.Tensor
    line, x = call.args[1::-1] if is_bucketize else call.args[:2]
    sorter = call.optional("sorter")
    if sorter is not None:
        only_unlabelled(call.coupling, sorter, range(sorter.rank), "used as an index")
    call.coupling.record_use(x)
    line = only_unlabelled(call.coupling, line, [line.rank - 1], "values are searched in order")
    if line.is_parameter:
        call.coupling.mix("a parameter is shared by all units", sources=line.sources or frozenset())
    for f in x.fields:
        call.coupling.mix("an averaged activation passes a nonlinear operator", ids=f)
    if line.rank > 1:
        for f in line.fields:
            call.coupling.role(line, f, reader=False)
        x = meet(call.coupling, x, line.moved(lambda t: t[..., :1]))
    return replace(x, shape=call.shape, sources=sources_of(call.values()), constant=None)


@rule(aten.where.default, aten.nonzero.default, aten.nonzero_numpy.default)
def places(call: Call) -> Any:
    """Indices of the entries that are not zero: numbers that name a place along every dimension."""
    x: AbstractTensor = call.args[0]
    call.coupling.record_use(x)
    only_unlabelled(call.coupling, x, range(x.rank), "its places are counted")

    def result(fake: torch.Tensor) -> AbstractTensor:
        shape = concrete_shape(fake)
        return AbstractTensor(
            shape, positions=positions(shape, range(len(shape))), sources=x.sources
        )

    return pytree.tree_map_only(torch.Tensor, result, call.node.meta["val"])


def _is_constant(call: Call) -> bool:
    return all(v.constant is not None for v in call.values()[1:])


def _zeros(call: Call, rank: int) -> Zeros | None:
    """An index of the same kind into ids, which have one entry along every indexed dimension.

    None for a mask without dimensions, which adds a dimension instead of indexing one.
    """
    given: Any = call.node.args[1]
    zeros: Zeros = []
    for node in given:
        if not isinstance(node, fx.Node):
            zeros.append(None)
            continue
        fake = node.meta["val"]
        if fake.dtype in (torch.bool, torch.uint8):
            if not fake.dim():
                return None
            # A mask indexes all of its dimensions at once.
            zeros += [torch.zeros(1, dtype=torch.int64)] * fake.dim()
        else:
            zeros.append(torch.zeros([1] * fake.dim(), dtype=torch.int64))
    return zeros + [None] * (rank - len(zeros))


def _indexed(zeros: Zeros) -> set[int]:
    return {d for d, index in enumerate(zeros) if index is not None}


def _field(ids: torch.Tensor) -> DimLabels:
    return DimLabels(ids, tuple(d for d, size in enumerate(ids.shape) if size > 1))


def _freeze_index(call: Call) -> None:
    for index in call.args[1]:
        if isinstance(index, AbstractTensor):
            only_unlabelled(call.coupling, index, range(index.rank), "used as an index")
