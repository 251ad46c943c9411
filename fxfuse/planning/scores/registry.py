"""The registry of importance scores (how to add one: docs/how-to/add-a-score.md)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from fxfuse.analysis.coupling import CouplingGraph, Index
from fxfuse.errors import OptionError, RuleError
from fxfuse.planning.options import Options, State

#: For each group, the score of each unit of one member, float64 [n_units].
Scores = dict[str, NDArray[np.float64]]

#: For each member that takes part, for each group: the units that still exist, int64 [k].
Kept = Mapping[int, Mapping[str, Index]]

#: A score gets the analysis, the members' tensors, the options and the units that exist; it returns
#: the scores of every member that takes part. What it says of units that are gone does not count.
Score = Callable[[CouplingGraph, Sequence[State], Options, Kept], Mapping[int, Scores]]

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
    """Registers a function as an importance score.

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
    """Checks that there is a score of this name."""
    _find(name)


def scores() -> Mapping[str, Score]:
    """All scores by name, read-only."""
    return MappingProxyType({name: entry.score for name, entry in _SCORES.items()})


def note_of(name: str, graph: CouplingGraph) -> Mapping[str, str]:
    """What a plan says about a score: option → value, besides its name."""
    return _find(name).note(graph)


def score_units(
    graph: CouplingGraph, states: Sequence[State], options: Options, kept: Kept
) -> dict[int, Scores]:
    """The score `options.score` of every unit that exists.

    Returns:
        For each member that takes part, for each group, float64 [n_units]; -inf where a unit does
        not exist.
    """
    found = _find(options.score).score(graph, states, options, kept)
    result: dict[int, Scores] = {}
    for member, groups in kept.items():
        result[member] = {}
        for name, units in groups.items():
            values = np.full(len(found[member][name]), -np.inf)
            values[units] = found[member][name][units]
            result[member][name] = values
    return result


def _find(name: str) -> _Entry:
    if name not in _SCORES:
        raise OptionError(f"unknown score {name!r}", how=f"use one of {', '.join(sorted(_SCORES))}")
    return _SCORES[name]
