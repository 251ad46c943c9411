"""Operators along one dimension in which the order counts: running sums, sorting, triangles."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch

from fxfuse.analysis.labels import AbstractTensor, DimLabels, positions
from fxfuse.analysis.rules.algebra import drop, only_unlabelled, reduce_over
from fxfuse.analysis.rules.registry import Call, concrete_shape, rule
from fxfuse.graph.torch_compat import pytree

aten = torch.ops.aten

_WHY = "the operator goes along this dimension in order"


@rule(
    aten.cumsum.default,
    aten.cumprod.default,
    aten.logcumsumexp.default,
    aten.cummax.default,
    aten.cummin.default,
    aten.argsort.default,
)
def along(call: Call) -> Any:
    """Labels along the dimension freeze; those of the others stay."""
    x: AbstractTensor = call.args[0]
    return _kept(call, [call.argument("dim") % max(x.rank, 1)])


@rule(aten.sort.default, aten.sort.stable, aten.topk.default)
def ranked(call: Call) -> Any:
    """As `along`, if anybody reads the indices; the values alone do not depend on an order."""
    x: AbstractTensor = call.args[0]
    dim = call.argument("dim") % max(x.rank, 1)
    if call.is_read(1):
        return _kept(call, [dim])
    call.coupling.record_use(x)
    reduce_over(call.coupling, x, [dim], "sorted over the members' neurons")
    for f in x.fields:
        call.coupling.mix("an averaged activation passes a nonlinear operator", ids=f)
    rest = drop(x, [dim], keepdim=True)

    def result(fake: torch.Tensor) -> AbstractTensor:
        shape = concrete_shape(fake)
        return replace(rest, shape=shape, positions=positions(shape, rest.unlabelled | {dim}))

    return [result(fake) for fake in call.node.meta["val"]]


@rule(aten.tril.default, aten.triu.default)
def triangle(call: Call) -> Any:
    """A triangle of the last two dimensions is kept."""
    x: AbstractTensor = call.args[0]
    return _kept(call, [x.rank - 2, x.rank - 1])


def _kept(call: Call, dims: Iterable[int]) -> Any:
    x: AbstractTensor = call.args[0]
    call.coupling.record_use(x)
    over = set(dims)
    stuck = {d: f for f in x.fields for d in over if f.dims == (d,)}
    rest = only_unlabelled(call.coupling, x, over, _WHY)
    for f in rest.fields:
        call.coupling.mix("an averaged activation passes a nonlinear operator", ids=f)

    def result(fake: torch.Tensor) -> AbstractTensor:
        shape = concrete_shape(fake)
        # Neurons that must keep their order still are neurons: their readers are the base member's
        # too.
        fields = [
            DimLabels(f.ids.narrow(d, 0, shape[d]), f.dims)
            for d, f in stuck.items()
            if shape[d] > 1
        ]
        varying = (rest.unlabelled | over) - set(stuck)
        return replace(
            rest,
            shape=shape,
            fields=(*rest.fields, *fields),
            positions=positions(shape, varying),
            constant=None,
        )

    return pytree.tree_map_only(torch.Tensor, result, _plain(call.node.meta["val"]))


def _plain(value: Any) -> Any:
    """Return the named tuples of results as lists."""
    return value if isinstance(value, torch.Tensor) else list(value)
