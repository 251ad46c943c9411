"""Options of `fuse` and `prune` from flat ones, for tests that draw them by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fxfuse import Calibration, Constraints, CouplingGraph, FusionPlan, Heads, Match, Refit, Size
from fxfuse.planning.context import Context, State
from fxfuse.planning.methods import methods
from fxfuse.planning.planner import make_plan
from fxfuse.planning.scores import score_units

_METHOD = ("score", "variant", "fraction", "reference", "regularisation")
_SIZE = (
    "width",
    "max_params",
    "max_flops",
    "latency",
    "batch",
    "multiple_of",
    "allocation",
    "mixing",
)
_CONSTRAINTS = ("freeze", "share", "ignore", "output_dims", "base_member")
_CALIBRATION = {
    "calibration_limit": "limit",
    "augmentations": "augmentations",
    "held_out": "held_out",
    "evaluate": "evaluate",
}
_HEADS = {"heads": "modules", "head_output": "output", "classes": "classes"}


def flat(**given: Any) -> dict[str, Any]:
    """Arguments of `fuse` and `prune`.

    `refit` and `match` are True, or the options of the step; without them nothing follows the
    fusion. A transplant without a score takes `l2`, with calibration inputs, too. Method `auto` is
    the whole way, with a budget of `steps` or `seconds` for the matching, and is judged; of all
    others nothing is held out, so that what was asked for is done, on all inputs as they are.
    """
    name = given.pop("method", "transplant")
    if given.get("calibration") is not None and name != "auto":
        given = {"held_out": 0, "augmentations": 0, **given}
    if name == "auto":
        budget = _taken(given, ("steps", "seconds"))
        given |= {"refit": True, "match": budget or True, "score": given.get("score", "obs")}
        name = "transplant"
    chosen = _taken(given, _METHOD)
    if name == "transplant":
        chosen = {"score": "l2", **chosen}
    found: dict[str, Any] = {"method": methods()[name](**chosen) if chosen else name}
    if size := _taken(given, _SIZE):
        found["size"] = Size(**size)
    if constraints := _taken(given, _CONSTRAINTS):
        found["constraints"] = Constraints(**constraints)
    if given.get("heads") in ("concat", "union"):
        given["head_output"] = given.pop("heads")
    if heads := _taken(given, _HEADS):
        found["heads"] = Heads(**{_HEADS[key]: value for key, value in heads.items()})
    if given.get("calibration") is None:
        given.pop("calibration", None)
    else:
        limits = {_CALIBRATION[k]: v for k, v in _taken(given, _CALIBRATION).items()}
        found["calibration"] = Calibration(given.pop("calibration"), **limits)
    steps = {"refit": Refit, "match": Match}
    wishes = {step: given.pop(step) for step in steps if given.get(step)}
    found["refine"] = [steps[s](**({} if w is True else w)) for s, w in wishes.items()]
    return found | given


def unjudged(inputs: Any) -> Calibration:
    """Calibration inputs that all fit: what is asked for is done, whatever comes of it."""
    return Calibration(inputs, held_out=0)


def planned(graph: CouplingGraph, states: Sequence[State], method: str, **given: Any) -> FusionPlan:
    """The plan of a method by name; options of the method and of the context side by side."""
    chosen = _taken(given, _METHOD)
    return make_plan(graph, states, methods()[method](**chosen), Context(**given))


def scored(
    graph: CouplingGraph, states: Sequence[State], kept: Any, score: str = "l2", **given: Any
) -> dict[int, Any]:
    """The scores of units, with what the context holds."""
    return score_units(graph, states, score, Context(**given), kept)


def _taken(given: dict[str, Any], names: Any) -> dict[str, Any]:
    return {name: given.pop(name) for name in names if name in given}
