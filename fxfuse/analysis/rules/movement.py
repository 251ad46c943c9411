"""Data movement: the very operator runs on the ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import fx

from fxfuse.analysis.labels import (
    NOTHING,
    AbstractTensor,
    DimLabels,
    Kind,
    Repeating,
    numbered,
    positions,
    without_repetitions,
)
from fxfuse.analysis.rules.algebra import only_unlabelled
from fxfuse.analysis.rules.registry import Call, rule
from fxfuse.graph.arguments import argument
from fxfuse.graph.operator_facts import FACTS, Contraction
from fxfuse.graph.torch_compat import pytree

aten = torch.ops.aten


@rule(
    aten.permute.default,
    aten.transpose.int,
    aten.t.default,
    aten.numpy_T.default,
    aten.mT.default,
    aten.movedim.int,
    aten.movedim.intlist,
    aten.swapaxes.default,
    aten.swapdims.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.squeeze.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.expand.default,
    aten.repeat.default,
    aten.tile.default,
    aten.repeat_interleave.self_int,
    aten.select.int,
    aten.slice.Tensor,
    aten.narrow.default,
    aten.roll.default,
    aten.flip.default,
    aten.rot90.default,
    aten.fft_fftshift.default,
    aten.fft_ifftshift.default,
    aten.chunk.default,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.tensor_split.sections,
    aten.tensor_split.indices,
    aten.unbind.int,
    aten.diagonal.default,
    aten.unfold.default,
    aten.channel_shuffle.default,
    aten.pixel_shuffle.default,
    aten.pixel_unshuffle.default,
)
def move(call: Call) -> Any:
    """Runs the operator on the ids of its first argument."""
    if call.node.target is aten.split_with_sizes.default:
        x, sizes, dim = (call.argument(name) for name in ("self", "split_sizes", "dim"))
        if sum(sizes) != x.shape[dim]:
            return _split_by_data(call, x, sizes, dim)
    return run_on_ids(call, call.node.target)


def _split_by_data(
    call: Call, x: AbstractTensor, sizes: Sequence[int], dim: int
) -> list[AbstractTensor]:
    """Tokens go to their experts: how many, the data say, so these sizes are made up."""
    x = only_unlabelled(call.coupling, x, [dim % x.rank], "is split at places that data choose")
    places = (torch.arange(size) % x.shape[dim] for size in sizes)
    return [_moved(call, x, partial(torch.index_select, dim=dim, index=i)) for i in places]


@rule(aten.view.default, aten.reshape.default, aten._unsafe_view.default)
def view(call: Call) -> Any:
    """Ids are expanded, not contiguous: `view` needs `reshape`."""
    return run_on_ids(call, aten.reshape.default)


@rule(
    aten.contiguous.default,
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
    aten.detach_.default,
    aten.lift_fresh_copy.default,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten._to_copy.default,
    aten.type_as.default,
)
def same(call: Call) -> AbstractTensor:
    """Layout, dtype and device change; the content does not."""
    value: AbstractTensor = call.args[0]
    return value


@rule(aten.expand_as.default, aten.view_as.default, aten.reshape_as.default)
def reshaped_as(call: Call) -> Any:
    """Takes the shape of another tensor, whose content plays no part."""
    shape = call.shape
    if call.node.target is aten.expand_as.default:
        return call.args[0].moved(lambda t: t.expand(shape))
    return call.args[0].moved(lambda t: t.reshape(shape))


@rule(aten.pad.default, aten.constant_pad_nd.default)
def pad(call: Call) -> Any:
    """Padded places are neurons of their own: whatever is added to them moves with them."""
    value: AbstractTensor = call.args[0]
    amounts = list(call.argument("pad"))
    padded = {value.rank - 1 - i // 2 for i, amount in enumerate(amounts) if amount}
    labelled = {d for f in value.fields for d in f.dims}
    is_constant = call.node.target is aten.constant_pad_nd.default
    if labelled & padded and not (is_constant or call.argument("mode") == "constant"):
        return NotImplemented

    def grow(f: DimLabels) -> DimLabels:
        # A channel's neurons are the channel's neurons at padded pixels too: only labelled
        # dimensions get padding.
        inside = [
            amount if (value.rank - 1 - i // 2) in f.dims else 0 for i, amount in enumerate(amounts)
        ]
        ids = torch.nn.functional.pad(f.ids, inside, value=0)
        new = torch.nn.functional.pad(torch.zeros_like(f.ids), inside, value=1).bool()
        size = int(new.sum())
        if size:
            start = call.coupling.fresh(size, (f"<{call.node.name}>", f.dims[0]))
            ids[new] = torch.arange(start, start + size)
            # Places with different padding are no equals, even if the same layers read them.
            call.coupling.record_use(
                AbstractTensor(tuple(ids.shape), (DimLabels(ids * new, f.dims),))
            )
        return DimLabels(ids, f.dims)

    shape = call.shape
    return AbstractTensor(
        shape,
        tuple(grow(f) for f in value.fields),
        positions(shape, value.unlabelled | (padded - labelled)),
        value.sources,
    )


@rule(aten.cat.default, aten.concat.default)
def cat(call: Call) -> Any:
    """Along the labelled dimension ids are joined; along another one they are tied."""
    # Legacy: empty one-dimensional tensors are skipped by the operator.
    parts: list[AbstractTensor] = [v for v in call.args[0] if v.shape != (0,)]
    return join(call, parts, call.argument("dim") % parts[0].rank)


@rule(aten.stack.default)
def stack(call: Call) -> Any:
    """Stacking is concatenation along a new dimension."""
    dim = call.argument("dim") % len(call.shape)
    return join(call, [v.moved(lambda t: t.unsqueeze(dim)) for v in call.args[0]], dim)


@rule(aten.slice_scatter.default)
def overwrite(call: Call) -> Any:
    """A part of a tensor is replaced: along its dimension, ids are too; others are tied."""
    whole, part = call.args[:2]
    dim = call.argument("dim") % whole.rank
    ends = [call.argument(name) for name in ("start", "end", "step")]

    def write(pieces: list[torch.Tensor]) -> torch.Tensor:
        result: torch.Tensor = aten.slice_scatter.default(*pieces, dim, *ends)
        return result

    return join(call, [whole, part], dim, write)


def join(
    call: Call,
    parts: list[AbstractTensor],
    dim: int,
    operation: Callable[[list[torch.Tensor]], torch.Tensor] | None = None,
) -> Any:
    """Join labelled tensors along one dimension, by concatenation or by another operation."""
    is_cat = operation is None
    operation = operation or partial(torch.cat, dim=dim)
    shape = call.shape
    depends_on_input = any(v.sources is None for v in parts)
    for place, value in enumerate(parts):
        call.coupling.record_use(value, min(place, 1))
        if depends_on_input:
            for f in value.fields:
                call.coupling.role(value, f, reader=False)
    along = any(dim in f.dims for v in parts for f in v.fields)
    if is_cat and any(_is_state(v, dim) for v in parts):
        # A zero state in front of weights: its neurons are those of the states that follow it.
        along |= _is_read_by_weights(call.node, dim, len(shape))
    fields: list[DimLabels] = []
    if along:
        rows = [_along(call, v, dim, is_state=is_cat and _is_state(v, dim)) for v in parts]
        found = _joined(rows, dim, operation)
        fields += [found] if found else []
    across = _across(call, parts, dim)
    if across is NotImplemented:
        return NotImplemented
    varying = frozenset[int]().union(*(v.unlabelled for v in parts))
    return AbstractTensor(
        shape,
        (*fields, *across),
        positions(shape, varying if along else varying | {dim}),
        None if depends_on_input else frozenset[str]().union(*(v.sources or () for v in parts)),
    )


def _joined(
    rows: list[DimLabels], dim: int, operation: Callable[[list[torch.Tensor]], torch.Tensor]
) -> DimLabels | None:
    wide = torch.broadcast_shapes(*(_with(r.shape, dim, 1) for r in rows))
    shapes = [_with(wide, dim, r.shape[dim]) for r in rows]

    def run(ids: Sequence[torch.Tensor]) -> torch.Tensor:
        return operation([x.expand(shape) for x, shape in zip(ids, shapes, strict=True)])

    def exact() -> DimLabels | None:
        places = [torch.tensor(place).expand([1] * len(wide)) for place in range(len(rows))]
        return DimLabels.of(run([r.ids for r in rows]), partial(run, places))

    if any(isinstance(r, Repeating) for r in rows):
        return without_repetitions(run([r.bare for r in rows]), exact)
    return exact()


def _with(shape: Sequence[int], dim: int, size: int) -> list[int]:
    return [size if d == dim else s for d, s in enumerate(shape)]


def _along(call: Call, value: AbstractTensor, dim: int, *, is_state: bool) -> DimLabels:
    """Labels of one part along the joined dimension; fresh ids where it has no labels.

    They freeze, except in a state that begins as a constant: that holds no order.
    """
    size = value.shape[dim]
    found = [f for f in value.fields if dim in f.dims]
    if found:
        for extra in found[1:]:
            call.coupling.tie_fields(found[0], extra)
        return found[0]
    start = call.coupling.fresh(size, (f"<{call.node.name}>", dim))
    own = numbered(value.shape, dim, start)
    if not is_state:
        why = "content without labels is joined to labelled neurons"
        call.coupling.freeze(own, Kind.SHARED_INDEX, why)
    return own


def _is_state(value: AbstractTensor, dim: int) -> bool:
    """Tell whether a tensor is a constant that does not vary along a dimension of several."""
    return value.sources == frozenset() and dim not in value.unlabelled and value.shape[dim] > 1


def _is_read_by_weights(node: fx.Node, dim: int, rank: int) -> bool:
    """Tell whether a layer reads a tensor's neurons along a dimension."""
    return any(
        isinstance(facts, Contraction)
        and argument(user, facts.input) is node
        and facts.channels % rank == dim
        for user, facts in ((user, FACTS.get(user.target)) for user in node.users)
    )


def _across(call: Call, parts: list[AbstractTensor], dim: int) -> Any:
    """One canonical field for labels along other dimensions (class token and patches, say)."""
    rest = [[f for f in v.fields if dim not in f.dims] for v in parts]
    canonical = next((fields for fields in rest if fields), [])
    for f in canonical:
        for part, fields in zip(parts, rest, strict=True):
            twin = next((g for g in fields if g.dims == f.dims), None)
            if twin is not None:
                call.coupling.tie_fields(f, twin)
            elif set(f.dims) & (part.unlabelled | {d for g in part.fields for d in g.dims}):
                return NotImplemented
    return canonical


def run_on_ids(call: Call, operation: Any) -> Any:
    """Run an operator on the ids of its first argument, constants as they are."""
    value = call.args[0]
    if not isinstance(value, AbstractTensor):
        return NotImplemented
    args, kwargs = pytree.tree_map(
        _real,
        (tuple(call.args[1:]), call.kwargs),
        is_leaf=lambda x: isinstance(x, AbstractTensor),
    )

    def run(ids: torch.Tensor) -> Any:
        return operation(ids, *args, **kwargs)

    probe = run(NOTHING.expand(value.shape))
    if isinstance(probe, torch.Tensor):
        return _moved(call, value, run)
    return [_moved(call, value, partial(_nth, run, i)) for i in range(len(probe))]


def _moved(call: Call, value: AbstractTensor, operation: Any) -> AbstractTensor:
    """Move a value; a neuron that is cut off from all others loses its label, so it freezes."""
    result = value.moved(operation)
    if len(result.fields) < len(value.fields):
        kind = Kind.SHARED_INDEX if value.is_parameter else Kind.KEEP_BASE
        for f in value.fields:
            ids = operation(f.ids.expand(value.shape))
            if DimLabels.of(ids) is None:
                why = "a single neuron is cut out by its index"
                call.coupling.freeze(DimLabels(ids, ()), kind, why, inside=True)
    return result


def _nth(run: Any, place: int, ids: torch.Tensor) -> torch.Tensor:
    part: torch.Tensor = run(ids)[place]
    return part


def _real(x: Any) -> Any:
    # Ids live on the CPU, wherever the network's constants are.
    return x.constant.cpu() if isinstance(x, AbstractTensor) and x.constant is not None else x
