"""When a matching run ends, and the learning rate on the way there."""

from __future__ import annotations

import math
import time

#: Share of the schedule, and steps at least: at once, the full rate undoes what the start knows.
_WARM_UP, _WARM_UP_STEPS = 0.03, 10
#: The usual rate, and how much more a network takes that normalises by statistics of the batch.
RATE, _NORMALISED = 3e-3, 2.0
#: Relative error of a start below which the rate is lower, as its square is. A step of AdamW is as
#: long as the rate, however small the gradient, so that a start that is close would first be thrown
#: as far as others.
_CLOSE = 0.25
#: Of a budget in seconds, the shares after which the members are asked no more: about what judges,
#: and about what is trained on.
SHARE_OF_JUDGED, SHARE_OF_POOL = 0.05, 0.25


class Budget:
    """How much of a run is done, in steps or in CPU seconds of this process."""

    def __init__(self, steps: int | None, seconds: float | None) -> None:
        self.steps = steps
        self._seconds = seconds
        self._begin = self._trained_from = time.process_time()
        self._reserved = 0.0

    def spent(self) -> float:
        """The CPU seconds since the budget was made."""
        return time.process_time() - self._begin

    def is_over(self, share: float) -> bool:
        """Whether more than this share of the seconds is over; never of a budget in steps."""
        return self._seconds is not None and self.spent() >= share * self._seconds

    def start_training(self, reserved: float) -> None:
        """Make what is left the whole of the schedule, but for what comes after it.

        Args:
            reserved: CPU seconds that are kept for that.
        """
        self._trained_from = time.process_time()
        self._reserved = reserved

    def share(self, step: int) -> float:
        """The share of the schedule that is over before step `step`, counted from 0."""
        if self._seconds is None:
            assert self.steps is not None
            return step / self.steps
        if step == 0:
            return 0.0
        left = self._begin + self._seconds - self._reserved - self._trained_from
        return (time.process_time() - self._trained_from) / left if left > 0 else 1.0


def course(share: float, step: int) -> float:
    """The learning rate, as a share of its highest value, after a share of the run."""
    warm = min(share / _WARM_UP, step / _WARM_UP_STEPS, 1.0)
    cosine = 0.5 + 0.5 * math.cos(math.pi * max(share - _WARM_UP, 0.0) / (1 - _WARM_UP))
    return (0.1 + 0.9 * warm) * cosine


def highest(error: float, *, normalises: bool) -> float:
    """The highest learning rate of a run.

    Args:
        error: Relative error of its start.
        normalises: Whether the network normalises by statistics of the batch: the length of its
            weights does not count then, and it takes larger steps well.
    """
    return RATE * min((error / _CLOSE) ** 2, 1.0) * (_NORMALISED if normalises else 1.0)
