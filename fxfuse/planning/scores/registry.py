"""The registry of importance scores (how to add one: docs/how-to/add-a-score.md)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from fxfuse.analysis.coupling import CouplingGraph, Index
from fxfuse.common.options import check_choice
from fxfuse.errors import RuleError
from fxfuse.planning.context import Context, State

#: For each group, the score of each unit of one member, float64 [n_units].
Scores = dict[str, NDArray[np.float64]]

#: For each member that takes part, for each group: the units that still exist, int64 [k].
Kept = Mapping[int, Mapping[str, Index]]

#: A score gets the analysis, the members' tensors, the options and the units that exist; it returns
#: the scores of every member that takes part. What it says of units that are gone does not count.
Score = Callable[[CouplingGraph, Sequence[State], Context, Kept], Mapping[int, Scores]]

#: What a plan should say about a score, besides its name.
Note = Callable[[CouplingGraph], Mapping[str, str]]


@dataclass(frozen=True)
class _Entry:
    score: Score
    note: Note


_SCORES: dict[str, _Entry] = {}


def _nothing(graph: CouplingGraph) -> Mapping[str, str]:
    return {}


def score(name: str, *, note: Note = _nothing) -> Callable[[Score], Score]:
    """Register a function as an importance score.

    Args:
        name: What users call it.
        note: What plans say about it, given the analysis.
    """

    def register(function: Score) -> Score:
        if name in _SCORES:
            raise RuleError(f"score {name!r} is registered twice", how="choose another name")
        _SCORES[name] = _Entry(function, note)
        return function

    return register


def check_score(name: str) -> None:
    """Check that there is a score of this name."""
    _find(name)


def scores() -> Mapping[str, Score]:
    """Return all scores by name, read-only."""
    return MappingProxyType({name: entry.score for name, entry in _SCORES.items()})


def note_of(name: str, graph: CouplingGraph) -> Mapping[str, str]:
    """Return what a plan says about a score: option → value, besides its name."""
    return _find(name).note(graph)


def score_units(
    graph: CouplingGraph, states: Sequence[State], name: str, context: Context, kept: Kept
) -> dict[int, Scores]:
    """Return the score of every unit that exists.

    Args:
        graph: The analysis of the members.
        states: For each member, its tensors by name.
        name: Name of the score.
        context: What it is measured on.
        kept: The members that take part, and which of their units exist.

    Returns:
        For each member that takes part, for each group, float64 [n_units]; -inf where a unit does
        not exist.
    """
    found = _find(name).score(graph, states, context, kept)
    result: dict[int, Scores] = {}
    for member, groups in kept.items():
        result[member] = {}
        for group, units in groups.items():
            values = np.full(len(found[member][group]), -np.inf)
            values[units] = found[member][group][units]
            result[member][group] = values
    return result


def _find(name: str) -> _Entry:
    check_choice("score", name, tuple(sorted(_SCORES)))
    return _SCORES[name]
