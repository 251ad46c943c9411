"""Rows of the demo's tables, gathered seed by seed."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any

from fxfuse.cli.demo.compare import Entry


@dataclass
class Row:
    """One row while its seeds come in; `network` says whose costs it has."""

    name: str
    network: str
    control: str | None
    accuracy: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    learning_rates: list[float] = field(default_factory=list)
    starts: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, entry: Entry) -> Row:
        """Return an empty row for an entry and those of its name in other seeds."""
        return cls(entry.name, entry.network, entry.control)

    def add(self, entry: Entry) -> None:
        """Add one seed."""
        self.accuracy.append(entry.accuracy)
        if entry.seconds is not None:
            self.seconds.append(entry.seconds)
        if entry.learning_rate is not None:
            self.learning_rates.append(entry.learning_rate)
        if entry.start is not None:
            self.starts.append(entry.start)

    def summary(self, costs: dict[str, Any]) -> dict[str, Any]:
        """Return the row as `run_demo` hands it out."""
        return {
            "name": self.name,
            "control": self.control,
            **costs,
            "accuracy": {
                "mean": statistics.mean(self.accuracy),
                "min": min(self.accuracy),
                "max": max(self.accuracy),
                "seeds": self.accuracy,
            },
            "seconds": statistics.mean(self.seconds) if self.seconds else None,
            "learning_rates": self.learning_rates,
            "starts": self.starts,
        }
