"""Normalisation and softmax: parameters join the ids of their dimension; some dimensions mix."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from fxfuse.analysis.labels import AbstractTensor
from fxfuse.analysis.rules.algebra import align, meet, reduce_over
from fxfuse.analysis.rules.registry import Call, rule
from fxfuse.graph.operator_facts import FACTS, Normalisation, operators

aten = torch.ops.aten


def _affine(call: Call, x: AbstractTensor, dim: int) -> AbstractTensor:
    """Return the parameters of a normalisation, whose first dimension is dimension `dim` of x."""
    facts, result = FACTS[call.node.target], x
    assert isinstance(facts, Normalisation)
    for name in facts.state:
        parameter: AbstractTensor | None = call.argument(name)
        if parameter is None:
            continue
        for f in parameter.fields:
            call.coupling.role(parameter, f, reader=False)
        trailing = x.rank - dim - parameter.rank
        column = parameter.moved(lambda t, n=trailing: t.reshape(*t.shape, *[1] * n))  # type: ignore[misc]
        result = meet(call.coupling, result, align(column, x.rank))
    for f in x.fields:
        call.coupling.mix("an averaged activation is normalised", ids=f)
    return replace(result, shape=x.shape, constant=None)


@rule(*operators(Normalisation, over="batch"))
def batch_norm(call: Call) -> AbstractTensor:
    """Per channel (dimension 1): weight, bias, running mean and variance.

    Without running statistics it normalises over everything else, as a weight that is standardised
    in the graph does.
    """
    x = call.argument("input")
    call.coupling.record_use(x)
    if call.argument("running_mean") is None:
        others = [d for d in range(x.rank) if d != 1]
        reduce_over(call.coupling, x, others, "normalisation over the members' neurons")
    return _affine(call, x, 1)


@rule(*operators(Normalisation, over="instance"))
def instance_norm(call: Call) -> AbstractTensor:
    """Per channel and sample, over the pixels."""
    x = call.argument("input")
    call.coupling.record_use(x)
    reduce_over(call.coupling, x, range(2, x.rank), "instance normalisation over labelled neurons")
    return _affine(call, x, 1)


@rule(*operators(Normalisation, over="last"))
def layer_norm(call: Call) -> AbstractTensor:
    """Over the last dimensions, which are mixed."""
    x, shape = call.argument("input"), call.argument("normalized_shape")
    call.coupling.record_use(x)
    first = x.rank - len(shape)
    reduce_over(call.coupling, x, range(first, x.rank), "normalisation over the members' neurons")
    return _affine(call, x, first)


@rule(*operators(Normalisation, over="group"))
def group_norm(call: Call) -> AbstractTensor:
    """Over the channels of each group and the pixels: the unit is the group, or a channel in it."""
    x, groups = call.argument("input"), call.argument("num_groups")
    call.coupling.record_use(x)
    split = x.moved(lambda t: t.unflatten(1, (groups, -1)))
    why, keeps = (
        "normalisation over the members' neurons",
        call.node.name in call.coupling.keeps_groups,
    )
    if keeps:
        for f in split.fields:
            call.coupling.tell_apart(f, 1)
        call.coupling.mix(why)
    reduce_over(call.coupling, split, range(3 if keeps else 2, split.rank), why)
    return _affine(call, x, 1)


@rule(
    aten.softmax.int,
    aten._softmax.default,
    aten.log_softmax.int,
    aten._log_softmax.default,
)
def softmax(call: Call) -> AbstractTensor:
    """Shape and labels stay; the dimension is mixed."""
    x: AbstractTensor = call.args[0]
    call.coupling.record_use(x)
    reduce_over(call.coupling, x, [call.args[1] % x.rank], "softmax over the members' neurons")
    for f in x.fields:
        call.coupling.mix("an averaged activation passes a softmax", ids=f)
    return x


#: What `_weight_norm` takes for one norm over all dimensions.
_ALL = -1


@rule(aten._weight_norm.default, aten._weight_norm_interface.default)
def weight_norm(call: Call) -> Any:
    """A weight is a direction times a length for each index of one dimension (or one for all)."""
    direction, length, coupling = call.args[0], call.args[1], call.coupling
    dim: int = call.argument("dim")
    if dim != _ALL:
        dim %= direction.rank
    coupling.record_use(direction)
    others = [d for d in range(direction.rank) if d != dim]
    for f in direction.fields:
        if set(f.dims) & set(others) and dim in f.dims:
            coupling.block(f, others)
    rows = [f for f in direction.fields if dim in f.dims]
    # Other members' places in a row are zero, so its norm stays, unless the row is an average.
    for f in rows:
        coupling.mix("an averaged weight is normalised", ids=f)
    if not rows:
        coupling.mix("a weight is normalised over the members' neurons")
    result = replace(
        meet(coupling, direction, align(length, direction.rank)), shape=direction.shape
    )
    if call.node.target is aten._weight_norm.default:
        return result
    return [result, replace(length, constant=None)]
