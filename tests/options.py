"""Options of `fuse` and `prune` from flat ones, for tests that draw them by name."""

from __future__ import annotations

from typing import Any

from fxfuse import Calibration, Constraints, Heads, Match, Refit, Size
from fxfuse.planning.methods import methods

_METHOD = ("score", "variant", "fraction", "reference", "regularisation")
_SIZE = ("width", "max_params", "max_flops", "multiple_of", "allocation", "mixing")
_CONSTRAINTS = ("freeze", "share", "ignore", "output_dims", "base_member")
_CALIBRATION = {"calibration_limit": "limit", "augmentations": "augmentations"}
_HEADS = {"heads": "modules", "head_output": "output", "classes": "classes"}


def flat(**given: Any) -> dict[str, Any]:
    """Arguments of `fuse` and `prune`.

    `refit` and `match` are True, or the options of the step; without them nothing follows the
    fusion. A transplant without a score takes `l2`, with calibration inputs, too.
    """
    name = given.pop("method", "transplant")
    chosen = _taken(given, _METHOD)
    if name == "transplant":
        chosen = {"score": "l2", **chosen}
    found: dict[str, Any] = {"method": methods()[name](**chosen) if chosen else name}
    if size := _taken(given, _SIZE):
        found["size"] = Size(**size)
    if constraints := _taken(given, _CONSTRAINTS):
        found["constraints"] = Constraints(**constraints)
    if heads := _taken(given, _HEADS):
        found["heads"] = Heads(**{_HEADS[key]: value for key, value in heads.items()})
    if "calibration" in given:
        limits = {_CALIBRATION[k]: v for k, v in _taken(given, _CALIBRATION).items()}
        found["calibration"] = Calibration(given.pop("calibration"), **limits)
    steps = {"refit": Refit, "match": Match}
    wishes = {step: given.pop(step) for step in steps if given.get(step)}
    found["refine"] = [steps[s](**({} if w is True else w)) for s, w in wishes.items()]
    return found | given


def _taken(given: dict[str, Any], names: Any) -> dict[str, Any]:
    return {name: given.pop(name) for name in names if name in given}
