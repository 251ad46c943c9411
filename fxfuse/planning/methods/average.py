"""Plain averaging: unit k of every member becomes unit k."""

from __future__ import annotations

from collections.abc import Sequence

from fxfuse.analysis.coupling import CouplingGraph
from fxfuse.planning.methods._alignment import averaged, frame_of, identity_orders, present
from fxfuse.planning.methods.registry import check_variant, method
from fxfuse.planning.options import Options, State
from fxfuse.planning.plan import UnitMap


@method("average")
def average(graph: CouplingGraph, states: Sequence[State], options: Options) -> tuple[UnitMap, ...]:
    """M = I/N, U = I: the mean of the members' weights, index by index.

    Only members whose units correspond already (fine-tuned from one network, say) average well. Of
    members of different widths, the frame is the reference's width (member 0's for "mean"): unit k
    is the mean of the members that have one, as where narrow networks are the first units of wide
    ones (Diao et al., "HeteroFL", arXiv:2010.01264), and further units are left out.
    """
    check_variant("average", options, ())
    frame = graph.of_member(frame_of(graph, len(states), options))
    orders = [
        present(graph, options, member, identity_orders(graph.of_member(member), frame))
        for member in range(len(states))
    ]
    return averaged(frame, orders)
