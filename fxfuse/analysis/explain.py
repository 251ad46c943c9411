"""Explanations: why a dimension is free or frozen, and which operators couple two."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import networkx as nx
import numpy as np

from fxfuse.analysis.coupling_constraints import CouplingConstraints
from fxfuse.analysis.freezing import FrozenReason
from fxfuse.analysis.grouping import CouplingGroup
from fxfuse.analysis.labels import Place
from fxfuse.errors import OptionError
from fxfuse.graph.capture import Program
from fxfuse.graph.source_lines import source_of


@dataclass(frozen=True)
class Explainer:
    """Puts an analysis into sentences."""

    program: Program
    coupling: CouplingConstraints
    group_of: Mapping[Place, tuple[CouplingGroup, ...]]
    frozen: Mapping[Place, FrozenReason]

    @cached_property
    def graph(self) -> nx.Graph:
        """Nodes `(tensor, dim)`, edges with the fx nodes that tied them."""
        coupling = self.coupling
        result: nx.Graph = nx.Graph()
        for owner, place in enumerate(coupling.owners):
            result.add_node(
                place,
                size=len(coupling.ids_of(owner)),
                groups=[g.name for g in self.group_of.get(place, ())],
                frozen=self.frozen[place].why if place in self.frozen else "",
            )
        for a, b, node in coupling.ties:
            pairs = np.stack([coupling.owner_positions(a), coupling.owner_positions(b)], axis=1)
            for left, right in np.unique(pairs, axis=0).tolist():
                if left == right or node is None:
                    continue
                u, v = coupling.owners[left], coupling.owners[right]
                if not result.has_edge(u, v):
                    result.add_edge(u, v, nodes=[])
                if node.name not in result.edges[u, v]["nodes"]:
                    result.edges[u, v]["nodes"].append(node.name)
        return result

    def one(self, place: Place) -> str:
        """Return why a dimension is free or frozen."""
        key = self._place(place)
        lines = [f"{place[0]}, dimension {key[1]}:"]
        for group in self.group_of.get(key, ()):
            slots = group.index[key].shape[1]
            lines.append(
                f"  free, in group {group.name!r}: {group.n_units} units, "
                f"{slots} slot{'s' if slots > 1 else ''} of each unit here; coupled with"
            )
            for other in group.index:
                if other != key:
                    lines += [f"    {other[0]}, dimension {other[1]}"]
                    lines += [f"      {step}" for step in self._chain(key, other)]
        reason = self.frozen.get(key)
        if reason is not None:
            some = len(reason.indices) != self.program.tensor(key[0]).shape[key[1]]
            part = f" ({len(reason.indices)} indices)" if some else ""
            lines.append(f"  frozen{part} ({reason.kind}): {reason.why}")
            if reason.node:
                lines.append(f"    at {reason.node}  {reason.source}".rstrip())
            if reason.operator:
                lines.append(f"    a rule for {reason.operator} belongs in {reason.rule_file}")
        return "\n".join(lines)

    def two(self, a: Place, b: Place) -> str:
        """Return the chain of operators that couples two dimensions."""
        first, second = self._place(a), self._place(b)
        head = f"{a[0]}, dimension {first[1]} and {b[0]}, dimension {second[1]}"
        if first == second:
            return f"{head}: the same place"
        steps = self._chain(first, second)
        if not steps:
            return f"{head}: not coupled"
        return "\n".join([f"{head}: coupled by", *(f"  {step}" for step in steps)])

    def _place(self, place: Place) -> Place:
        name, dim = place
        if name not in self.program.canonical:
            close = [n for n in self.program.names if name in n][:5]
            raise OptionError(
                f"the network has no tensor {name!r}",
                how="use a name of model.state_dict()" + (f", such as {close}" if close else ""),
            )
        rank = self.program.tensor(name).dim()
        if not -rank <= dim < rank:
            raise OptionError(f"{name!r} has no dimension {dim}", how=f"use one of 0 to {rank - 1}")
        return self.program.canonical[name], dim % rank

    def _chain(self, a: Place, b: Place) -> list[str]:
        if a not in self.graph or b not in self.graph or not nx.has_path(self.graph, a, b):
            return []
        by_name = {node.name: node for node in self.program.graph.nodes}
        path = nx.shortest_path(self.graph, a, b)
        steps = []
        for left, right in pairwise(path):
            name = self.graph.edges[left, right]["nodes"][0]
            source = source_of(by_name[name])
            steps.append(
                f"{left[0]}:{left[1]} - {right[0]}:{right[1]} by {name} "
                f"[{by_name[name].target}]  {source}".rstrip()
            )
        return steps
