"""Picking by index.

Constant indices move data. Others (token ids, relative positions, what a threshold lets through)
may pick along dimensions without labels: labels of the other dimensions stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from fxfuse.labels import Value, positions
from fxfuse.rules.algebra import meet, merge_positions, only_unlabelled
from fxfuse.rules.movement import run_on_ids
from fxfuse.rules.registry import Call, rule

aten = torch.ops.aten

_PICKED = "picked by an index that is not constant: each index has a meaning of its own"


@rule(aten.index.Tensor)
def index(call: Call) -> Any:
    """`x[:, i, j]`: constant indices move data, others pick along dimensions without labels."""
    x: Value = call.args[0]
    indices: Sequence[Value | None] = call.args[1]
    nodes: Any = call.node.args[1]
    given = [i for i in indices if i is not None]
    if all(i.constant is not None for i in given):
        return run_on_ids(call, call.node.target)
    if any(i.fields for i in given):
        return NotImplemented
    dims: list[int] = []
    plain: list[torch.Tensor | None] = []
    for value, node in zip(indices, nodes, strict=True):
        first = len(plain)
        if value is None:
            plain.append(None)
        elif node.meta["val"].dtype in (torch.bool, torch.uint8):
            if len(given) > 1:
                return NotImplemented
            # What a mask lets through is one dimension, as long as the result says.
            plain += [torch.zeros(call.shape[first], dtype=torch.int64)] * value.rank
        else:
            plain.append(torch.zeros(value.shape, dtype=torch.int64))
        dims += range(first, len(plain)) if value is not None else ()
    return _pick(call, x, dims, lambda t: aten.index.Tensor(t, plain), given)


@rule(aten.index_select.default)
def index_select(call: Call) -> Any:
    """Picks along one dimension."""
    x, dim, chosen = call.args[:3]
    if chosen.constant is not None:
        return run_on_ids(call, call.node.target)
    if chosen.fields:
        return NotImplemented
    first = torch.zeros(chosen.shape, dtype=torch.int64)
    return _pick(call, x, [dim % x.rank], lambda t: t.index_select(dim, first), [chosen])


@rule(aten.gather.default)
def gather(call: Call) -> Any:
    """`x[i, index[i, j]]` along one dimension: the others meet those of the index."""
    x, dim, chosen = call.args[0], call.args[1] % call.args[0].rank, call.args[2]
    if chosen.constant is not None:
        return run_on_ids(call, call.node.target)
    x = only_unlabelled(call.ledger, x, [dim], _PICKED)
    call.ledger.touch(x)
    shape = tuple(chosen.shape)

    def cut(t: torch.Tensor) -> torch.Tensor:
        t = t.narrow(dim, 0, 1)
        return t[tuple(slice(0, 1 if d == dim else n) for d, n in enumerate(shape))].expand(
            [shape[d] if d == dim else -1 for d in range(len(shape))]
        )

    picked = x.moved(cut)
    picked = replace(picked, positions=(*picked.positions, *positions(shape, [dim])))
    return replace(meet(call.ledger, picked, chosen), shape=shape, sources=_sources(x, chosen))


def _pick(
    call: Call,
    x: Value,
    dims: Sequence[int],
    operation: Callable[[torch.Tensor], torch.Tensor],
    given: Sequence[Value],
) -> Value:
    """Picks along `dims` of x: no label is left there, so any index gives the ids of the result."""
    call.ledger.touch(x)
    for f in x.fields:
        call.ledger.role(x, f, reader=False)
    x = only_unlabelled(call.ledger, x, dims, _PICKED)
    kept = [d for d in range(x.rank) if d not in dims]
    result = x.moved(operation)
    # Whatever no dimension of x explains comes from the indices.
    passed = replace(x, fields=(), positions=positions(x.shape, kept)).moved(operation)
    picked = positions(call.shape, set(range(len(call.shape))) - passed.unlabelled)
    return replace(
        result,
        positions=merge_positions((*picked, *result.positions)),
        sources=_sources(x, *given),
    )


def _sources(x: Value, *given: Value) -> frozenset[str] | None:
    found = x.sources
    for value in given:
        found = None if found is None or value.sources is None else found | value.sources
    return found
