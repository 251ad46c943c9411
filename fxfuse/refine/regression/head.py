"""The last layer fitted to the ensemble's probabilities: convex, on top of the least squares."""

from __future__ import annotations

import torch

from fxfuse.refine.regression.solve import Fit

#: Steps of L-BFGS; the problem has classes · (features + 1) unknowns and is convex.
_STEPS = 60


def fit_head(rows: torch.Tensor, logits: torch.Tensor, start: Fit, alpha: float) -> Fit:
    """Minimises KL(ensemble ‖ student) over the last layer.

    KL + α/2 · level · ‖B − B₀‖², where B₀ is the least-squares map and level the mean square of a
    feature: the same penalty that the regression has.

    Args:
        rows: The layer's inputs, float32 [n, 1, features].
        logits: The ensemble's logits, float32 [n, classes].
        start: The least-squares map.
        alpha: α.

    Returns:
        The fitted map.
    """
    x = rows[:, 0].double()
    mean, level = x.mean(0), x.var(0, correction=0).mean().clamp(min=1e-12)
    x = (x - mean) / level.sqrt()
    wanted = logits.double().softmax(1)
    prior = (start.matrix[0].double() * level.sqrt()).contiguous()
    shift = start.shift[0].double() + mean @ start.matrix[0].double()
    matrix, bias = prior.clone().requires_grad_(), shift.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [matrix, bias], max_iter=_STEPS, line_search_fn="strong_wolfe", tolerance_grad=1e-8
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        answer = (x @ matrix + bias).log_softmax(1)
        loss = -(wanted * answer).sum(1).mean() + alpha / 2 * (matrix - prior).square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    found = (matrix.detach() / level.sqrt()).unsqueeze(0)
    return Fit(found.float(), (bias.detach() - mean @ found[0]).float().unsqueeze(0))
