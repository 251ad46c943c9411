"""Importance of units, one file per kind of score."""

from fxfuse.planning.scores import activation, bn_scale, magnitude, obs, sensitivity
from fxfuse.planning.scores.magnitude import degree_of
from fxfuse.planning.scores.registry import (
    Kept,
    Score,
    Scores,
    check_score,
    note_of,
    score,
    score_units,
    scores,
)

__all__ = [
    "Kept",
    "Score",
    "Scores",
    "activation",
    "bn_scale",
    "check_score",
    "degree_of",
    "magnitude",
    "note_of",
    "obs",
    "score",
    "score_units",
    "scores",
    "sensitivity",
]
