"""Importance of units."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from fxfuse.coupling import CouplingGraph, Index
from fxfuse.errors import UnknownScoreError
from fxfuse.labels import Kind

#: Score name → degree of the norm.
SCORES: Mapping[str, int] = {"l1": 1, "l2": 2}

Scores = dict[str, NDArray[np.float64]]


def check_score(score: str) -> int:
    """The degree of a score's norm.

    Raises:
        UnknownScoreError: There is no such score.
    """
    if score not in SCORES:
        raise UnknownScoreError(
            f"unknown score {score!r}", how=f"use one of {', '.join(sorted(SCORES))}"
        )
    return SCORES[score]


def magnitude(
    graph: CouplingGraph,
    state: Mapping[str, torch.Tensor],
    degree: int,
    *,
    n_members: int,
    kept: Mapping[str, Index] | None = None,
) -> Scores:
    """Group magnitude of each unit of one member.

    The score of a unit is Σ |w|^degree over all weights that it owns: rows of what writes it and
    columns of what reads it (biases, tables that are added, and buffers are left out). This orders
    units as `torch_pruning.importance.MagnitudeImportance(p=degree)` orders the channels of the
    members' concatenation, whose output layer is scaled by 1/N.

    Args:
        graph: The analysis of the members.
        state: The member's tensors by name.
        degree: 1 or 2.
        n_members: N, the members that are concatenated.
        kept: For each group, the units that still exist (all, if None): weights towards the others
            do not count.

    Returns:
        For each group, float64 [n_units]; units that do not exist score -inf.
    """
    scores: Scores = {g.name: np.zeros(g.n_units) for g in graph.groups}
    weights = multiplied(graph)
    for name in graph.captured.names:
        places = [(name, d) for d in range(graph.captured.tensor(name).dim())]
        if graph.captured.canonical[name] != name or name not in weights:
            continue
        if not any(place in graph.group_of for place in places):
            continue
        power = state[name].detach().abs().to(torch.float64).pow(degree)
        scale = (1.0 / n_members) ** degree if _is_output(graph, name) else 1.0
        for dim, place in enumerate(places):
            others = [d for d in range(power.dim()) if d != dim]
            for group in graph.group_of.get(place, ()):
                restricted = power
                for other in others:
                    index = _existing(graph, (name, other), kept)
                    if index is not None:
                        restricted = restricted.index_select(other, index.to(power.device))
                line = restricted.sum(others).cpu().numpy() if others else restricted.cpu().numpy()
                scores[group.name] += scale * line[group.index[place]].sum(axis=1)
    for group_name, units in (kept or {}).items():
        gone = np.ones(len(scores[group_name]), dtype=bool)
        gone[units] = False
        scores[group_name][gone] = -np.inf
    return scores


def _existing(
    graph: CouplingGraph, place: tuple[str, int], kept: Mapping[str, Index] | None
) -> torch.Tensor | None:
    """Indices of a place that no dropped unit owns; None: all of them."""
    if kept is None or place not in graph.group_of:
        return None
    exists = np.ones(graph.captured.tensor(place[0]).shape[place[1]], dtype=bool)
    for group in graph.group_of[place]:
        exists[group.index[place].reshape(-1)] = False
        exists[group.index[place][kept[group.name]].reshape(-1)] = True
    return torch.from_numpy(np.flatnonzero(exists))


def _is_output(graph: CouplingGraph, name: str) -> bool:
    return any(
        place[0] == name and reason.kind is Kind.OUTPUT for place, reason in graph.frozen.items()
    )


def multiplied(graph: CouplingGraph) -> frozenset[str]:
    """Names of the parameters that multiply activations (not biases, not added tables)."""
    used: dict[str, bool] = {}
    captured = graph.captured
    for node in captured.graph.nodes:
        if node.op != "get_attr" or str(node.target) not in captured.canonical:
            continue
        name = captured.canonical[str(node.target)]
        if not isinstance(captured.tensor(name), torch.nn.Parameter):
            continue
        for user in node.users:
            used[name] = used.get(name, False) or not _is_added(node, user)
    return frozenset(name for name, multiplies in used.items() if multiplies)


def _is_added(node: torch.fx.Node, user: torch.fx.Node) -> bool:
    schema = getattr(user.target, "_schema", None)
    if schema is None:
        return False
    if schema.name in ("aten::add", "aten::add_", "aten::sub", "aten::sub_"):
        return True
    names = [a.name for a in schema.arguments]
    given = {names[i]: a for i, a in enumerate(user.args)} | dict(user.kwargs)
    added = ("bias", "running_mean", "running_var")
    addend = ("self",) if schema.name == "aten::addmm" else ()
    return any(given.get(n) is node for n in (*added, *addend))
