"""Plain averaging: unit k of every member becomes unit k."""

from __future__ import annotations

from collections.abc import Sequence

from fxfuse.coupling import CouplingGraph
from fxfuse.methods._alignment import averaged, identity_orders
from fxfuse.methods.registry import check_variant, method
from fxfuse.options import Options, State
from fxfuse.plan import UnitMap


@method("average")
def average(graph: CouplingGraph, states: Sequence[State], options: Options) -> tuple[UnitMap, ...]:
    """M = I/N, U = I: the mean of the members' weights, index by index.

    Only members whose units correspond already (fine-tuned from one network, say) average well.
    """
    check_variant("average", options, ())
    return averaged(graph, [identity_orders(graph) for _ in range(len(states))])
