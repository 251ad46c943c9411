"""Tables: rows are looked up by number, so they stay; the channels of a row are neurons."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch

from fxfuse.analysis.labels import AbstractTensor, positions
from fxfuse.analysis.rules.algebra import only_unlabelled
from fxfuse.analysis.rules.registry import Call, concrete_shape, rule

aten = torch.ops.aten


def _table(call: Call, weight: AbstractTensor, others: Iterable[AbstractTensor]) -> AbstractTensor:
    """Return the labels of a table's channels [1, c]; whatever selects rows has no neurons."""
    for value in others:
        only_unlabelled(call.coupling, value, range(value.rank), "says which rows are looked up")
    call.coupling.record_use(weight)
    table = only_unlabelled(call.coupling, weight, [0], "rows of a table are looked up by number")
    return replace(table.moved(lambda t: t[:1]), positions=())


@rule(aten.embedding.default)
def embedding(call: Call) -> AbstractTensor:
    """`v c, * → * c`."""
    weight, indices = call.args[0], call.args[1]
    table = _table(call, weight, [indices])
    shape = call.shape
    sources = None
    if indices.sources is None or weight.sources is None:
        for f in weight.fields:
            call.coupling.role(weight, f, reader=False)
    else:
        sources = weight.sources | indices.sources
    row = table.moved(lambda t: t.reshape([1] * (len(shape) - 1) + [-1]))
    return AbstractTensor(shape, row.fields, positions(shape, range(len(shape) - 1)), sources)


@rule(aten.embedding_bag.default, aten.embedding_bag.padding_idx)
def embedding_bag(call: Call) -> list[AbstractTensor]:
    """`v c, * → b c` and the operator's notes on its bags."""
    weight, others = call.args[0], call.values()[1:]
    table = _table(call, weight, others)
    for f in weight.fields:
        call.coupling.role(weight, f, reader=False)
    if call.argument("mode") == _MAX:
        for f in table.fields:
            call.coupling.mix("an averaged activation passes a nonlinear operator", ids=f)
    results = []
    for fake in call.node.meta["val"]:
        shape = concrete_shape(fake)
        # The result and, in mode max, the numbers of the rows that it came from.
        has_channels = len(shape) == 2 and shape[1] == weight.shape[1]
        fields = table.fields if has_channels else ()
        rest = range(1) if has_channels else range(len(shape))
        results.append(AbstractTensor(shape, fields, positions(shape, rest)))
    return results


_MAX = 2


@rule(aten.embedding_renorm_.default)
def renormalise(call: Call) -> AbstractTensor:
    """Rows that are looked up are scaled to a largest norm over their channels."""
    weight: AbstractTensor = call.args[0]
    call.coupling.record_use(weight)
    call.coupling.mix("normalisation over the members' neurons")
    only_unlabelled(call.coupling, weight, [0], "rows of a table are looked up by number")
    return weight
