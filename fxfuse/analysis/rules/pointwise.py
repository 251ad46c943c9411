"""Pointwise operators: operands meet element by element."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch

from fxfuse.analysis.labels import AbstractTensor, DimLabels, Kind, neurons
from fxfuse.analysis.rules.algebra import align, meet
from fxfuse.analysis.rules.registry import Call, rule
from fxfuse.graph.operator_facts import FACTS, Dropout, operators
from fxfuse.graph.torch_compat import pytree, schema_of

aten = torch.ops.aten

#: Pointwise operators without the tag.
_UNTAGGED = (
    *operators(Dropout),
    aten.abs_.default,
    aten.rrelu_.default,
    aten.gelu_.default,
    aten.elu_.default,
    aten.hardtanh.default,
    aten.hardtanh_.default,
    aten.hardswish.default,
    aten.hardswish_.default,
    aten.hardsigmoid_.default,
    aten.leaky_relu_.default,
    aten.silu_.default,
    aten.mish_.default,
    aten.relu6.default,
    aten.relu6_.default,
    aten.selu.default,
    aten.selu_.default,
    aten.celu_.default,
    aten.softplus.default,
    aten.log_sigmoid.default,
    aten.threshold_.default,
    aten.masked_fill.Scalar,
    aten.masked_fill_.Scalar,
    aten.masked_fill.Tensor,
    aten.masked_fill_.Tensor,
    aten.where.ScalarOther,
    aten.where.ScalarSelf,
    aten.where.Scalar,
    aten.rsub.Tensor,
    aten.floor_divide.default,
    aten.floor_divide.Scalar,
    aten.arctan2.default,
    aten.less.Tensor,
    aten.less.Scalar,
    aten.greater.Tensor,
    aten.greater.Scalar,
    aten.__and__.Tensor,
    aten.__or__.Tensor,
    aten.__xor__.Tensor,
    aten.complex.default,
    aten.polar.default,
    aten.isreal.default,
)

#: The mean of the members passes through these unchanged: f(mean(x)) = mean(f(x)).
_ADDITIVE = {
    "aten::add",
    "aten::add_",
    "aten::sub",
    "aten::sub_",
    "aten::neg",
    "aten::neg_",
    "aten::rsub",
    "aten::positive",
}
_SCALING = {"aten::mul", "aten::mul_", "aten::div", "aten::div_"}


def is_pointwise(target: Any) -> bool:
    """Tell whether torch itself says that an operator is pointwise."""
    return torch.Tag.pointwise in getattr(target, "tags", ())


@rule(*_UNTAGGED)
def pointwise(call: Call) -> AbstractTensor:
    """All tensor operands broadcast and meet."""
    operands = call.values()
    for place, value in enumerate(operands):
        call.coupling.record_use(value, min(place, 1))
    rank = max(v.rank for v in operands)
    aligned = [align(v, rank) for v in operands]
    if any(v.sources is None for v in operands):
        for value in aligned:
            for f in value.fields:
                call.coupling.role(value, f, reader=False)
    aligned = [_without_basis(call, value, aligned) for value in aligned]
    result = aligned[0]
    for other in aligned[1:]:
        result = meet(call.coupling, result, other)
    if not _is_linear(call, operands):
        for f in result.fields:
            call.coupling.mix("an averaged activation passes a nonlinear operator", ids=f)
    if result.is_parameter and not _keeps_zeros(call):
        call.coupling.mix("zeros between the members' weights do not stay zeros")
    return replace(result, shape=call.shape, constant=None)


def _without_basis(
    call: Call, value: AbstractTensor, operands: list[AbstractTensor]
) -> AbstractTensor:
    """Freeze the indices of a parameter that all units share: knots, centres, frequencies.

    Either nothing else varies along them while units stand elsewhere, or neighbours meet.
    """
    if not value.is_parameter:
        return value
    others = [v for v in operands if v is not value]
    own = {d for f in value.fields for d in f.dims}
    units = any(own.isdisjoint(g.dims) for v in others if not v.is_parameter for g in v.fields)
    varying = {d for v in others for g in (*v.fields, *v.positions) for d in g.dims}
    shared = [f for f in value.fields if units and varying.isdisjoint(f.dims)]
    for f in shared:
        call.coupling.freeze(f, Kind.SHARED_INDEX, "one index is shared by all units")
    for f in value.fields:
        if any(_are_neighbours(f, g) for v in others if v.is_parameter for g in v.fields):
            why = "neighbouring entries of one parameter meet: their order matters"
            call.coupling.freeze(f, Kind.SHARED_INDEX, why)
    kept = tuple(f for f in value.fields if not any(f is s for s in shared))
    return replace(value, fields=kept, positions=(*value.positions, *shared))


def _are_neighbours(f: DimLabels, g: DimLabels) -> bool:
    """Tell whether each neuron of a field meets one at a fixed distance in the same dimension."""
    if f.dims != g.dims or f.ids.shape != g.ids.shape:
        return False
    steps = (neurons(f.bare) - neurons(g.ids)).unique()
    return len(steps) == 1 and 0 < abs(int(steps)) < f.ids.numel()


def _keeps_zeros(call: Call) -> bool:
    """Tell whether an operator keeps the zeros between members in weights with several labels."""

    def stand_in(x: Any) -> Any:
        if not isinstance(x, AbstractTensor):
            return x
        # Any value but zero stands for tensors in which members are not told apart.
        return torch.full([1] * x.rank, 0.0 if len(x.fields) > 1 else 0.7, dtype=torch.float64)

    if all(len(v.fields) < 2 for v in call.values()):
        return True
    args, kwargs = pytree.tree_map(
        stand_in, (call.args, call.kwargs), is_leaf=lambda x: isinstance(x, AbstractTensor)
    )
    run: Any = call.node.target
    try:
        return bool(run(*args, **kwargs) == 0)
    except RuntimeError:
        # It takes no such numbers (a mask, say): it may write anything between the members.
        return False


def _is_linear(call: Call, operands: list[AbstractTensor]) -> bool:
    if isinstance(FACTS.get(call.node.target), Dropout):
        return True
    name = schema_of(call.node.target).name
    return name in _ADDITIVE or (name in _SCALING and len(operands) == 1)


@rule(aten.glu.default)
def gated_linear_unit(call: Call) -> AbstractTensor:
    """The first half times the sigmoid of the second: a unit is a pair."""
    x: AbstractTensor = call.args[0]
    dim = call.argument("dim") % x.rank
    half = x.shape[dim] // 2
    parts = [x.moved(partial(torch.narrow, dim=dim, start=s, length=half)) for s in (0, half)]
    for place, part in enumerate(parts):
        call.coupling.record_use(part, place)
    for f in parts[0].fields:
        call.coupling.mix("an averaged activation passes a nonlinear operator", ids=f)
    return replace(meet(call.coupling, *parts), shape=call.shape)


@rule(aten.prelu.default)
def parametric_relu(call: Call) -> AbstractTensor:
    """One slope for each channel (dimension 1), or one for all."""
    x, slope = call.args[0], call.args[1]
    call.coupling.record_use(x)
    for f in slope.fields:
        call.coupling.role(slope, f, reader=False)
    column = slope.moved(lambda t: t.reshape([-1] + [1] * max(x.rank - 2, 0)))
    for f in x.fields:
        call.coupling.mix("an averaged activation passes a nonlinear operator", ids=f)
    return replace(meet(call.coupling, x, align(column, x.rank)), shape=x.shape)
