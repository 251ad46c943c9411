"""What a refit fits one after the other, and what became of it."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, nan

from torch import fx

from fxfuse.activations.recurrence import Recurrent
from fxfuse.refine.regression.channel import PerChannel
from fxfuse.refine.regression.fit_target import FitTarget

#: A layer with what it aims at, a normalisation, or recurrent layers.
Work = FitTarget | PerChannel | Recurrent

NO_TARGET = "no member has the value that it should have"
NO_LAYER = "the network of this width computes it by other operators"
NO_CLOSER = "no map is closer on the calibration inputs"
NO_CLOSER_OUTSIDE = "no map is closer on inputs that it was not fitted on"


@dataclass(frozen=True)
class LayerFit:
    """What became of one layer.

    Attributes:
        weight: Name of its weight; of a recurrent layer, the one that reads the input.
        aim: Name of the graph node that it was fitted to.
        before: Error before, on the rows it was fitted on, as a share of the target's variance.
        after: Error after.
        fitted: Whether the fit was kept; else the layer is as transplanted.
        why: Why it was left, or "".
        held_out: Error of a fit to four fifths of the rows on the others; NaN where there was none.
        alpha: The penalty of the fit.
    """

    weight: str
    aim: str
    before: float
    after: float
    fitted: bool
    why: str = ""
    held_out: float = nan
    alpha: float = nan


def left(work: Work, why: str, error: float = inf, held_out: float = nan) -> LayerFit:
    """The layer as it was transplanted."""
    return LayerFit(_name_of(work), aim_of(work).name, error, error, False, why, held_out)


def node_of(work: Work) -> fx.Node:
    """The node at which it is done."""
    return work.layer.node if isinstance(work, FitTarget) else work.node


def aim_of(work: Work) -> fx.Node:
    """The node that is aimed at."""
    return work.aim if isinstance(work, FitTarget) else work.node


def tensors_of(work: Work) -> set[str]:
    """Names of the tensors that a fit changes."""
    if isinstance(work, Recurrent):
        return set(work.tensors)
    if isinstance(work, PerChannel):
        names = [work.weight, work.bias]
    else:
        names = [work.layer.weight, work.layer.bias]
        if work.norm is not None:
            names += [work.norm.weight, work.norm.bias]
    return {name for name in names if name}


def inputs_of(work: Work) -> set[fx.Node]:
    """The activations of the fused network that must be there when a layer is fitted."""
    if isinstance(work, Recurrent):
        return set(work.reads)
    if isinstance(work, FitTarget):
        partner = work.partner
        return {work.layer.input} | ({partner.layer.input} if partner else set())
    read = work.node.args[0]
    assert isinstance(read, fx.Node)
    return {read}


def read_in_members(work: Recurrent) -> tuple[fx.Node, ...]:
    """The nodes that stand for what the members' recurrent layers read: sequence, then states."""
    return work.theirs or work.reads


def _name_of(work: Work) -> str:
    if isinstance(work, Recurrent):
        return work.layers[0][0].inner
    return work.layer.weight if isinstance(work, FitTarget) else work.weight
