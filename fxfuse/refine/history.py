"""What became of each network on the way of a fusion."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fxfuse.common.readable import Description, Readable

#: Attribute of a candidate → its key in JSON, where that says more.
_KEYS = {"seconds": "cpu_seconds"}


#: What became of a member of another architecture.
OTHER = "another architecture: not a start"


@dataclass
class Candidate:
    """A network that the way came by.

    Attributes:
        name: `member 1`, `members 0, 2 side by side`, `fused`, `refitted` or
            `matched from ...`.
        chosen_by: Its distance from the ensemble on the inputs that choose.
        judged: The same on the inputs that accept, which nothing was fitted or chosen on.
        against: The candidate that it had to beat; "" for a start.
        gain: How much closer to the ensemble it is than that one, mean over the inputs that accept.
        low: Lower end of the interval of the gain.
        high: Upper end of it.
        accepted: Whether it is better, beyond the uncertainty of the comparison.
        seconds: CPU seconds that it took.
        verdict: What became of it.
    """

    name: str
    chosen_by: float = math.nan
    judged: float = math.nan
    against: str = ""
    gain: float = math.nan
    low: float = math.nan
    high: float = math.nan
    accepted: bool = False
    seconds: float = 0.0
    verdict: str = ""


@dataclass(frozen=True, repr=False)
class History(Readable):
    """Every candidate of a fusion, with its distance from the ensemble, cost and verdict.

    `print(history)` is a table.

    Attributes:
        candidates: In the order in which they were made.
        chosen: Name of the candidate that is returned.
        unit: Unit of the distances.
        task: What the output was taken for.
        why: Why.
        asking: CPU seconds of asking the members about the inputs that choose.
        inputs: Number of inputs that accept.
    """

    candidates: tuple[Candidate, ...]
    chosen: str
    unit: str
    task: str
    why: str
    asking: float
    inputs: int

    def __getitem__(self, name: str) -> Candidate:
        """The candidate of this name."""
        return next(c for c in self.candidates if c.name == name)

    @property
    def starts(self) -> tuple[Candidate, ...]:
        """The candidates for which nothing was fitted."""
        known = (c for c in self.candidates if not c.against and not math.isnan(c.judged))
        return tuple(c for c in known if c.verdict != OTHER)

    def table(self) -> dict[str, list[str]]:
        """Return a column for each heading, with a line for each candidate."""
        cs = self.candidates
        return {
            "network": [c.name for c in cs],
            self.unit: [_number(c.judged) for c in cs],
            "closer than": [c.against or "–" for c in cs],
            "by": [_gain(c) for c in cs],
            "CPU s": [f"{c.seconds:.1f}" for c in cs],
            "verdict": [c.verdict for c in cs],
        }

    def described(self) -> Description:
        """The candidates, the one that was chosen, and what the task was taken for."""
        rows: dict[str, Any] = {c.name: _told(c) for c in self._most_telling(6)}
        if len(self.candidates) > len(rows):
            rows["and"] = f"{len(self.candidates) - len(rows)} more in history.candidates"
        rows["task"] = f"{self.task}: {self.why}; task= says otherwise"
        return (
            f"{self.chosen} is returned, judged on {self.inputs} inputs that no fit has seen "
            f"({self.unit})",
            rows,
        )

    def _most_telling(self, count: int) -> list[Candidate]:
        """The one that was chosen, what was fitted, and the best starts, in their order."""

        def rank(c: Candidate) -> tuple[bool, bool, bool, float]:
            known = not math.isnan(c.judged)
            return c.name != self.chosen, not c.against, not known, c.judged if known else 0.0

        chosen = sorted(self.candidates, key=rank)[:count]
        return [c for c in self.candidates if c in chosen]

    def as_json(self) -> Mapping[str, Any]:
        """Plain data; what was not measured is None, and CPU times say that they are."""
        whole = dict(vars(self))
        whole["asking_cpu_seconds"] = whole.pop("asking")
        return {
            **whole,
            "candidates": [
                {
                    _KEYS.get(name, name): (
                        None if isinstance(value, float) and not math.isfinite(value) else value
                    )
                    for name, value in vars(c).items()
                }
                for c in self.candidates
            ],
        }


def _number(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "–"


def _gain(c: Candidate) -> str:
    return f"{c.gain:+.2g} [{c.low:.2g}, {c.high:.2g}]" if math.isfinite(c.low) else "–"


def _told(c: Candidate) -> str:
    if math.isnan(c.judged):
        return c.verdict
    text = f"{c.judged:.3g}, {c.verdict}"
    if c.against and math.isfinite(c.low):
        text += f" ({_gain(c)} closer than {c.against})"
    return f"{text}, {c.seconds:.1f} s"
