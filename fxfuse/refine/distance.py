"""The divergence that distillation minimises.

Notation of shapes: k classes, * any further dimensions.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def divergence(
    answers: Tensor, wanted: Tensor, temperature: float = 1.0, class_dim: int = 1
) -> Tensor:
    """T² · KL(softmax(wanted / T) ‖ softmax(answers / T)), mean over all positions.

    Hinton et al., "Distilling the knowledge in a neural network", arXiv:1503.02531, section 2.

    Args:
        answers: Logits of the network `[b, *]`, with k classes along one dimension.
        wanted: Those of the ensemble, of the same shape.
        temperature: T.
        class_dim: The dimension of the classes.

    Returns:
        A scalar in nats, for T = 1.
    """
    total = functional.kl_div(
        (answers / temperature).log_softmax(class_dim),
        (wanted / temperature).log_softmax(class_dim),
        reduction="sum",
        log_target=True,
    )
    return total * (temperature**2 * wanted.shape[class_dim] / wanted.numel())
