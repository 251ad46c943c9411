"""Residual streams: groups whose units meet nothing but what treats all mixtures of them alike."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import fx

from fxfuse.analysis.coupling import CouplingGraph, Index
from fxfuse.analysis.labels import AbstractTensor
from fxfuse.analysis.rules.registry import find
from fxfuse.graph.arguments import argument
from fxfuse.graph.operator_facts import FACTS, Contraction, Dropout, Normalisation

_ATEN = torch.ops.aten
#: Sums, a copy, and a table that writes units.
_LINEAR = {_ATEN.add.Tensor, _ATEN.sub.Tensor, _ATEN.clone.default, _ATEN.embedding.default}
#: Where they are over other dimensions.
_MEANS = {_ATEN.mean.dim, _ATEN.sum.dim_IntList}
#: Files of rules for what only moves values.
_MOVES = {
    "fxfuse.analysis.rules.movement",
    "fxfuse.analysis.rules.selection",
    "fxfuse.analysis.rules.creation",
}


def streams(graph: CouplingGraph) -> frozenset[str]:
    """Return the names of the groups of which any mixture of units can take a unit's place.

    Such units are added, moved, normalised over, written and read by layers without groups of
    channels, and nothing else: no activation and no scale meets one of them by itself.
    """
    numbers = _numbers(graph)
    mixed = {
        number
        for number, group in enumerate(graph.groups)
        if any(rows.shape[1] != 1 for rows in group.index.values())
    }
    normed: set[int] = set()
    for node in graph.program.graph.nodes:
        if node.op != "call_function":
            continue
        met = _groups_at(node.all_input_nodes, graph, numbers)
        if met and not _is_linear(node, met, graph, numbers):
            mixed |= met
        elif _is_norm(node):
            normed |= met
    return frozenset(graph.groups[number].name for number in normed - mixed)


def _numbers(graph: CouplingGraph) -> Index:
    """Return for each neuron the number of its group, or -1; int64 [ids]."""
    place = {group.name: number for number, group in enumerate(graph.groups)}
    found = np.full(graph.coupling.count, -1, dtype=np.int64)
    for owner, where in enumerate(graph.coupling.owners):
        for group in graph.group_of.get(where, ()):
            rows = group.index[where].reshape(-1)
            found[graph.coupling.starts[owner] + rows] = place[group.name]
    return found


def _groups_at(nodes: Iterable[fx.Node], graph: CouplingGraph, numbers: Index) -> set[int]:
    found: set[int] = set()
    for node in nodes:
        value = graph.values.get(node)
        if isinstance(value, AbstractTensor):
            for field in value.fields:
                found |= set(numbers[field.held].tolist())
    return found - {-1}


def _is_linear(node: fx.Node, met: set[int], graph: CouplingGraph, numbers: Index) -> bool:
    """Tell whether a node treats mixtures of the units that it meets as it treats the units."""
    facts = FACTS.get(node.target)
    if node.target in _LINEAR or _is_norm(node) or isinstance(facts, Dropout):
        return True
    # Without a bias, both operands may be activations.
    if isinstance(facts, Contraction) and facts.bias:
        return argument(node, facts.groups) in (None, 1)
    if node.target in _MEANS:
        return met <= _groups_at([node], graph, numbers)
    rule = find(node.target)
    return rule is not None and rule.__module__ in _MOVES


def _is_norm(node: fx.Node) -> bool:
    """Whether a node normalises over the units; in any other basis that is an approximation."""
    facts = FACTS.get(node.target)
    return isinstance(facts, Normalisation) and facts.over == "last"
