"""Errors: complete messages, one class per bad input, safe across processes."""

from __future__ import annotations

import inspect
import pickle

import pytest

from fxfuse import errors
from fxfuse.errors import FxfuseError

CLASSES = [
    value
    for _, value in inspect.getmembers(errors, inspect.isclass)
    if issubclass(value, FxfuseError)
]


def test_message_has_all_parts_in_order():
    error = FxfuseError("what.", where="node", why="because", how="do this")
    assert str(error).splitlines() == [
        "what.",
        "  where: node",
        "  why: because",
        "  how to mend: do this",
    ]


def test_empty_parts_are_left_out():
    assert str(FxfuseError("what.", how="do this")) == "what.\n  how to mend: do this"
    assert str(FxfuseError("what.")) == "what."


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_class_survives_pickling_and_is_described(kind):
    error = pickle.loads(pickle.dumps(kind("what", where="here", why="because", how="so")))
    assert type(error) is kind
    assert (error.what, error.where, error.why, error.how) == ("what", "here", "because", "so")
    assert inspect.getdoc(kind)


def test_bad_inputs_of_the_command_line_each_have_a_class_of_their_own():
    names = {kind.__name__ for kind in CLASSES}
    assert {
        "TooFewMembersError",
        "MemberMismatchError",
        "NonFiniteWeightsError",
        "ExampleInputError",
        "CaptureError",
        "UnknownMethodError",
        "UnknownScoreError",
        "CheckpointMissingError",
        "CheckpointCorruptError",
        "CheckpointPickleError",
        "NothingToFuseError",
        "OutputExistsError",
    } <= names
