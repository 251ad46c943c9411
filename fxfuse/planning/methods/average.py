"""Plain averaging: unit k of every member becomes unit k."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fxfuse.analysis.coupling import CouplingGraph
from fxfuse.planning.context import Context, Reference, State
from fxfuse.planning.methods._alignment import averaged, frame_of, identity_orders, present
from fxfuse.planning.methods.registry import Method, method
from fxfuse.planning.plan import UnitMap


@method("average")
@dataclass(frozen=True)
class Average(Method):
    """M = I/N, U = I: the mean of the members' weights, index by index.

    Only members whose units correspond already (fine-tuned from one network, say) average well. Of
    members of different widths, the frame is the reference's width (member 0's for "mean"): unit k
    is the mean of the members that have one, as where narrow networks are the first units of wide
    ones (Diao et al., "HeteroFL", arXiv:2010.01264), and further units are left out.

    Attributes:
        reference: Member that the others are aligned to, by number, or `mean`.
    """

    reference: Reference = 0

    @property
    def weights_only(self) -> bool:
        """Whether it looks at weights only: always."""
        return True

    def maps(
        self, graph: CouplingGraph, states: Sequence[State], context: Context
    ) -> tuple[UnitMap, ...]:
        """Make the maps."""
        frame = graph.of_member(frame_of(graph, len(states), self.reference, context))
        orders = [
            present(graph, context, member, identity_orders(graph.of_member(member), frame))
            for member in range(len(states))
        ]
        return averaged(frame, orders)
