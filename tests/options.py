"""Options of `fuse` and `prune` from flat ones, for tests that draw them by name."""

from __future__ import annotations

from typing import Any

from fxfuse import (
    Calibration,
    Constraints,
    Heads,
    Match,
    Refit,
    Size,
)
from fxfuse.planning.methods import methods

_SIZE = ("width", "max_params", "max_flops", "multiple_of", "allocation", "mixing")
_CONSTRAINTS = ("freeze", "share", "ignore", "output_dims", "base_member")
_METHOD = ("score", "variant", "fraction", "reference", "regularisation")


def options(**flat: Any) -> dict[str, Any]:
    """Arguments of `fuse` and `prune`.

    `refit` and `match` are True or options of the step; without them nothing follows the fusion.
    """
    found: dict[str, Any] = {"refine": []}
    chosen = {name: flat.pop(name) for name in _METHOD if name in flat}
    name = flat.pop("method", "transplant")
    found["method"] = methods()[name](**chosen) if chosen else name
    size = {name: flat.pop(name) for name in _SIZE if name in flat}
    if size:
        found["size"] = Size(**size)
    constraints = {name: flat.pop(name) for name in _CONSTRAINTS if name in flat}
    if constraints:
        found["constraints"] = Constraints(**constraints)
    if "heads" in flat:
        heads = {"modules": flat.pop("heads")}
        heads |= {k: flat.pop(o) for o, k in _HEADS if o in flat}
        found["heads"] = Heads(**heads)
    if "calibration" in flat:
        told = {k: flat.pop(o) for o, k in _CALIBRATION if o in flat}
        found["calibration"] = Calibration(flat.pop("calibration"), **told)
    for step, kind in (("refit", Refit), ("match", Match)):
        wish = flat.pop(step, None)
        if wish:
            found["refine"].append(kind() if wish is True else kind(**wish))
    return found | flat


_HEADS = (("head_output", "output"), ("classes", "classes"))
_CALIBRATION = (("calibration_limit", "limit"), ("augmentations", "augmentations"))
