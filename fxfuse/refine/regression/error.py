"""How far a layer's answers are from what they should be, behind the activation that reads them."""

from __future__ import annotations

import torch


class Error:
    """Mean squared error behind the activation, as a share of the target's variance.

    Args:
        cut: What the activation lets through: (lower, upper) limit.
        aim: The target, float32 [n, channels].
    """

    def __init__(self, cut: tuple[float, float], aim: torch.Tensor) -> None:
        self.cut = cut
        self.wanted = aim.clamp(*cut)
        variance = (self.wanted - self.wanted.mean(0)).square().mean()
        self.variance = variance.clamp(min=1e-30)

    def __call__(self, answer: torch.Tensor) -> float:
        """The error of answers [n, channels]."""
        return float((answer.clamp(*self.cut) - self.wanted).square().mean() / self.variance)


def relaxed(cut: tuple[float, float], aim: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
    """Where the activation cuts the target, any answer that is cut as well will do."""
    low, high = cut
    result = torch.where(aim <= low, answer.clamp(max=low), aim)
    return torch.where(aim >= high, answer.clamp(min=high), result)
