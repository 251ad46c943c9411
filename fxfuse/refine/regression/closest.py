"""The best map of a layer: its penalty by rows that the fit has not seen, and relaxed targets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import isfinite, nan

from fxfuse.refine.regression.error import Error, relaxed
from fxfuse.refine.regression.fit_target import FitTarget
from fxfuse.refine.regression.rows import Sample, evenly
from fxfuse.refine.regression.solve import Fit, Ridge
from fxfuse.refine.regression.work import NO_CLOSER, NO_CLOSER_OUTSIDE, LayerFit

#: Times that targets are relaxed where the activation cuts them, and the share of the error by
#: which one more time has to be better for another one.
_RELAXATIONS, _WORTH = 3, 0.02
#: Factor between penalties, how many larger ones are tried, and by how much a fit must be worse on
#: rows that it has not seen for that.
_FACTOR, _LARGER, _APART = 10.0, 2, 1.1
#: Fewer rows that are held out say nothing; so many rows tell an error well.
_FEW_ROWS, _ENOUGH_ROWS = 32, 2048
#: Features from which on a larger penalty is tried only once.
_MANY_FEATURES = 2048


@dataclass
class Closest:
    """What came of a fit.

    Attributes:
        fit: The best map, if it is better than the one there was.
        before: The error of that one on all rows, as a share of the target's variance.
        after: The same of the best map.
        held_out: The error of a fit to the other rows on those that were held out.
        alpha: The penalty.
        why: Why there is no fit, or "".
    """

    fit: Fit | None
    before: float
    after: float
    held_out: float
    alpha: float
    why: str = ""

    def reported(self, route: FitTarget) -> LayerFit:
        """What the report says of a layer that was fitted."""
        return LayerFit(
            route.layer.weight,
            route.aim.name,
            self.before,
            self.after,
            True,
            held_out=self.held_out,
            alpha=self.alpha,
        )


def find_closest(
    cut: tuple[float, float],
    found: Sample,
    held: Fit,
    ridge: Ridge,
    alpha: float,
    *,
    chosen_by_user: bool,
) -> Closest:
    """Find the best map of a layer.

    Args:
        cut: What the activation behind the aim lets through.
        found: The rows.
        held: The map that there is.
        ridge: The regression on the rows.
        alpha: The penalty to begin with.
        chosen_by_user: Whether that is the only one.
    """
    error_of = Error(cut, found.aim(found.wanted), found.weights)
    before = error_of(found.aim(held(found.rows)))
    held_out = nan
    if int(found.held.sum()) >= _FEW_ROWS:
        alpha, held_out, better = _judged(cut, found, held, ridge, alpha, only=chosen_by_user)
        if not better:
            return Closest(None, before, before, held_out, alpha, NO_CLOSER_OUTSIDE)
    best, chosen = before, None
    for fit, error in _fits(cut, found, ridge, alpha, error_of):
        if error < best:
            best, chosen = error, fit
    return Closest(chosen, before, best, held_out, alpha, "" if chosen else NO_CLOSER)


def _fits(
    cut: tuple[float, float], found: Sample, ridge: Ridge, alpha: float, error_of: Error
) -> Iterator[tuple[Fit, float]]:
    """Fits with their errors: to the target, and to what will do as well behind the activation."""
    aim, wanted, last = found.aim(found.wanted), found.wanted, float("inf")
    for _ in range(1 + _RELAXATIONS * isfinite(min(map(abs, cut)))):
        fit = ridge.fit(wanted, alpha)
        answer = found.aim(fit(found.rows))
        error = error_of(answer)
        yield fit, error
        if error > (1 - _WORTH) * last:
            return
        last = error
        wanted = found.output(relaxed(cut, aim, answer))


def _judged(
    cut: tuple[float, float],
    found: Sample,
    held: Fit,
    ridge: Ridge,
    alpha: float,
    *,
    only: bool,
) -> tuple[float, float, bool]:
    """The penalty that is best on the rows held out, its error there, and whether it is better."""
    sides = (mask.nonzero().flatten() for mask in (found.held, ~found.held))
    unseen, seen = (found.part(rows[evenly(len(rows), _ENOUGH_ROWS)]) for rows in sides)
    outside = Error(cut, unseen.aim(unseen.wanted), unseen.weights)
    inside = Error(cut, seen.aim(seen.wanted), seen.weights)
    before = outside(unseen.aim(held(unseen.rows)))
    fit = ridge.trial(found.wanted, alpha)
    best = outside(unseen.aim(fit(unseen.rows)))
    if not only and best > _APART * inside(seen.aim(fit(seen.rows))):
        for _ in range(1 if found.rows.shape[2] > _MANY_FEATURES else _LARGER):
            larger = alpha * _FACTOR
            error = outside(unseen.aim(ridge.trial(found.wanted, larger)(unseen.rows)))
            if not error < best:
                break
            alpha, best = larger, error
    if not best < before:
        # Behind an activation that cuts, the target itself may be too much to ask for.
        best = min(best, _relaxed_trial(cut, found, unseen, ridge, alpha, outside))
    return alpha, best, best < before


def _relaxed_trial(
    cut: tuple[float, float],
    found: Sample,
    unseen: Sample,
    ridge: Ridge,
    alpha: float,
    outside: Error,
) -> float:
    """The least error on the rows held out of fits to relaxed targets."""
    relaxations = _RELAXATIONS * isfinite(min(map(abs, cut)))
    aim, wanted, best = found.aim(found.wanted), found.wanted, float("inf")
    fit = ridge.trial(wanted, alpha) if relaxations else None
    for _ in range(relaxations):
        assert fit is not None
        wanted = found.output(relaxed(cut, aim, found.aim(fit(found.rows))))
        fit = ridge.trial(wanted, alpha)
        best = min(best, outside(unseen.aim(fit(unseen.rows))))
    return best
