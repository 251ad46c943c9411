"""How far a layer's answers are from what they should be, behind the activation that reads them."""

from __future__ import annotations

import torch


class Error:
    """Mean squared error behind the activation, as a share of the target's variance.

    Args:
        cut: What the activation lets through: (lower, upper) limit.
        aim: The target, float32 [n, channels].
        weights: How much each row counts, float32 [n]; None: all the same.
    """

    def __init__(
        self, cut: tuple[float, float], aim: torch.Tensor, weights: torch.Tensor | None = None
    ) -> None:
        self.cut = cut
        self.wanted = aim.clamp(*cut)
        self.weights = None if weights is None else (weights / weights.mean())[:, None]
        mean = self._mean(self.wanted)
        self.variance = self._mean((self.wanted - mean).square()).mean().clamp(min=1e-30)

    def _mean(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.mean(0) if self.weights is None else (self.weights * rows).mean(0)

    def __call__(self, answer: torch.Tensor) -> float:
        """The error of answers [n, channels]."""
        squares = (answer.clamp(*self.cut) - self.wanted).square()
        return float(self._mean(squares).mean() / self.variance)


def relaxed(cut: tuple[float, float], aim: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
    """Where the activation cuts the target, any answer that is cut as well will do."""
    low, high = cut
    result = torch.where(aim <= low, answer.clamp(max=low), aim)
    return torch.where(aim >= high, answer.clamp(min=high), result)
