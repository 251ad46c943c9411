"""Two layers whose outputs are added, as one layer that reads the inputs of both."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from fxfuse.refine.regression.fit_target import FitTarget
from fxfuse.refine.regression.solve import Fit


def joint_pairs(routes: Iterable[FitTarget]) -> list[tuple[FitTarget, FitTarget]]:
    """Layers that one regression can fit: the one that comes first, and the one that comes last.

    Both write straight into their sum, in the same layout, and mix all their inputs.
    """
    return [
        (route.partner, route)
        for route in routes
        if route.partner is not None and _alike(route, route.partner)
    ]


def _alike(last: FitTarget, first: FitTarget) -> bool:
    layers = (last.layer, first.layer)
    straight = not last.chain and not first.chain
    return (
        straight
        and all(x.groups == 1 for x in layers)
        and len({x.facts.space for x in layers}) == 1
    )


def joined(first: Fit, last: Fit) -> Fit:
    """The sum of two maps, on the features of the first and then of the last."""
    return Fit(torch.cat([first.matrix, last.matrix], 1), first.shift + last.shift)


def parted(both: Fit, features: int, *, shift_in_last: bool) -> tuple[Fit, Fit]:
    """The inverse of `joined`.

    Args:
        both: The sum.
        features: How many features the first map has.
        shift_in_last: Whether the last map takes the shift; else the first does.
    """
    zero = torch.zeros_like(both.shift)
    first, last = both.matrix[:, :features], both.matrix[:, features:]
    shifts = (zero, both.shift) if shift_in_last else (both.shift, zero)
    return Fit(first, shifts[0]), Fit(last, shifts[1])
