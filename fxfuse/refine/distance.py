"""How far a network's answers are from the ensemble's: what matching minimises, and what judges it.

Notation of shapes: b batch, k classes, * any further dimensions.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from fxfuse.errors import MemberError
from fxfuse.refine.outputs import Outputs

# Temperature of the divergence in the loss, and the weight of the squared differences beside it.
_TEMPERATURE, _SQUARES = 2.0, 0.1
_LEAST_VARIANCE = 1e-30


def loss(answer: Tensor, wanted: Tensor, kind: Outputs) -> Tensor:
    """What matching minimises.

    For logits `divergence` at T = 2, and a tenth of the mean squared difference up to a constant
    per input. The divergence counts what decides between classes, and hardly what experts make of
    classes that neither of them knows; the squares keep the small probabilities in place where the
    divergence does not see them any more.

    Args:
        answer: Outputs of the network `[b, *]`, for logits `[b, k]`.
        wanted: Those of the ensemble, of the same shape.
        kind: `logits`, or `values`, for which the loss is the mean squared difference.

    Returns:
        A scalar, in the dtype of `wanted`.
    """
    check_shapes(answer, wanted)
    answer = answer.to(wanted.dtype)
    squares = _squares(answer, wanted, kind)
    if kind == "values":
        return squares
    return divergence(answer, wanted, _TEMPERATURE) + _SQUARES * squares


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


def check_shapes(answer: Tensor, wanted: Tensor) -> None:
    """Check that outputs can be compared."""
    if answer.shape != wanted.shape:
        raise MemberError(
            "module and members return outputs of different shapes",
            where=f"module {list(answer.shape)}, members {list(wanted.shape)}",
            why="matching compares them value by value",
            how="use members with the module's classes and output size",
        )


def distance(answers: Tensor, wanted: Tensor, kind: str) -> float:
    """What judges a network: one number, by which networks of one kind of output are compared.

    Args:
        answers: Outputs of the network `[b, *]`, for logits `[b, k]`.
        wanted: Those of the ensemble, of the same shape.
        kind: `logits`: KL(softmax(wanted) ‖ softmax(answers)) in nats, mean over inputs; else: the
            mean squared difference relative to the variance over inputs.
    """
    if kind == "logits":
        # Rounding must not bring anything closer to the ensemble than the ensemble itself.
        return max(float(divergence(answers.double(), wanted.double())), 0.0)
    return float((answers - wanted).square().mean() / _variance(wanted))


def relative_error(answers: Tensor, wanted: Tensor, kind: Outputs) -> float:
    """Root of the mean squared difference over that of what the ensemble's answers vary by.

    Args:
        answers: Outputs of the network `[b, *]`, for logits `[b, k]`.
        wanted: Those of the ensemble, of the same shape.
        kind: Of logits, a constant per input is no difference.
    """
    targets = wanted - wanted.mean(dim=1, keepdim=True) if kind == "logits" else wanted
    return float((_squares(answers, wanted, kind) / _variance(targets)).sqrt())


def _squares(answers: Tensor, wanted: Tensor, kind: Outputs) -> Tensor:
    difference = answers - wanted
    if kind == "logits":
        difference = difference - difference.mean(dim=1, keepdim=True)
    return difference.square().mean()


def _variance(wanted: Tensor) -> Tensor:
    return wanted.var(0, correction=0).mean().clamp(min=_LEAST_VARIANCE)
