"""When a matching run ends, and the learning rate on the way there."""

from __future__ import annotations

import math
import time

#: Share of the schedule, and steps at least: at once, the full rate undoes what the start knows.
_WARM_UP, _WARM_UP_STEPS = 0.03, 10
#: Of a budget in seconds, the share after which the members are asked no more.
SHARE_OF_POOL = 0.25


class Budget:
    """How much of a run is done, in steps or in CPU seconds of this process.

    Args:
        steps: The steps, or None.
        seconds: The CPU seconds, or None.
        since: When it began, as `time.process_time()` says; None: now.
    """

    def __init__(
        self, steps: int | None, seconds: float | None, since: float | None = None
    ) -> None:
        self.steps = steps
        self.seconds = seconds
        self._begin = self._trained_from = time.process_time() if since is None else since
        self._reserved = 0.0

    def left(self) -> float:
        """The CPU seconds that are left; infinite for a budget in steps."""
        return float("inf") if self.seconds is None else self.seconds - self.spent()

    def spent(self) -> float:
        """The CPU seconds since the budget was made."""
        return time.process_time() - self._begin

    def is_over(self, share: float) -> bool:
        """Whether more than this share of the seconds is over; never of a budget in steps."""
        return self.seconds is not None and self.spent() >= share * self.seconds

    def start_training(self, reserved: float) -> None:
        """Make what is left the whole of the schedule, but for what comes after it.

        Args:
            reserved: CPU seconds that are kept for that.
        """
        self._trained_from = time.process_time()
        self._reserved = reserved

    def share(self, step: int) -> float:
        """The share of the schedule that is over before step `step`, counted from 0."""
        if self.seconds is None:
            assert self.steps is not None
            return step / self.steps
        if step == 0:
            return 0.0
        left = self._begin + self.seconds - self._reserved - self._trained_from
        return (time.process_time() - self._trained_from) / left if left > 0 else 1.0


def course(share: float, step: int) -> float:
    """The learning rate, as a share of its highest value, after a share of the run."""
    warm = min(share / _WARM_UP, step / _WARM_UP_STEPS, 1.0)
    cosine = 0.5 + 0.5 * math.cos(math.pi * max(share - _WARM_UP, 0.0) / (1 - _WARM_UP))
    return (0.1 + 0.9 * warm) * cosine
