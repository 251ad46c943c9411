"""A fitted map written back into a layer, through the batch norm behind it."""

from __future__ import annotations

import torch

from fxfuse.refine.regression.fit_target import FitTarget, Norm
from fxfuse.refine.regression.rows import evenly
from fxfuse.refine.regression.solve import Fit

State = dict[str, torch.Tensor]

#: Below this share of the largest γ a channel's own scale says nothing.
_SMALL = 1e-6
#: So many rows tell the statistics of a batch norm, by which the function does not change.
_ENOUGH_ROWS = 4096


def current(route: FitTarget, state: State) -> Fit:
    """The affine map from a layer's input rows to its (normalised) output."""
    layer, norm = route.layer, route.norm
    matrix = layer.matrix(layer.held(state).detach().float())
    groups, _, outputs = matrix.shape
    zero = matrix.new_zeros(groups * outputs)
    shift = layer.held_bias(state).detach().float() if layer.bias else zero
    if norm is not None:
        weight, bias, mean, variance = (
            state[name].detach().float()
            for name in (norm.weight, norm.bias, norm.mean, norm.variance)
        )
        factor = weight / (variance + norm.eps).sqrt()
        shift = (shift - mean) * factor + bias
        matrix = matrix * factor.reshape(groups, 1, outputs)
    return Fit(matrix, shift.reshape(groups, outputs))


def write(
    route: FitTarget,
    state: State,
    fit: Fit,
    rows: torch.Tensor,
    ratios: torch.Tensor | None = None,
) -> None:
    """Sets a layer's tensors so that its (normalised) output in eval mode is `fit`.

    Behind a batch norm the layer's scale stays that of the weights that it had, and the running
    statistics become those of its new outputs on `rows`, so that training starts from the same
    function.

    Args:
        route: The layer.
        state: Tensors by name, changed.
        fit: The map.
        rows: The layer's inputs, float32 [n, groups, features].
        ratios: How many rows each of them stands for, float32 [n], 1 on average; None: all the
            same.
    """
    layer = route.layer
    if route.norm is None:
        layer.put(state, layer.weight_of(fit.matrix, layer.held(state)))
        if layer.bias:
            layer.put_bias(state, fit.shift.flatten())
        return
    scale = _scale(route.norm, state)
    groups, _, outputs = fit.matrix.shape
    matrix = fit.matrix * scale.reshape(groups, 1, outputs)
    some = evenly(len(rows), _ENOUGH_ROWS)
    new = Fit(matrix, torch.zeros_like(fit.shift))(rows[some]).double()
    share = torch.ones(len(new), 1, device=new.device) if ratios is None else ratios[some, None]
    share = share / share.mean()
    centre = (share * new).mean(0)
    mean, variance = centre.float(), (share * (new - centre).square()).mean(0).float()
    layer.put(state, layer.weight_of(matrix, layer.held(state)))
    if layer.bias:
        layer.put_bias(state, torch.zeros_like(mean))
    _set_norm(route.norm, state, mean, variance, 1 / scale, fit.shift.flatten() + mean / scale)


def _scale(norm: Norm, state: State) -> torch.Tensor:
    """√(variance + ε)/|γ| of each channel, or 1 where γ is next to nothing; [channels]."""
    gamma = state[norm.weight].float().abs()
    deviation = (state[norm.variance].float() + norm.eps).sqrt()
    return torch.where(gamma > _SMALL * gamma.max(), deviation / gamma, torch.ones_like(gamma))


def _set_norm(
    norm: Norm,
    state: State,
    mean: torch.Tensor,
    variance: torch.Tensor,
    factor: torch.Tensor,
    centre: torch.Tensor,
) -> None:
    """Sets a batch norm to x ↦ factor · (x − mean) + centre, with these running statistics."""
    _set(state, norm.mean, mean)
    _set(state, norm.variance, variance)
    _set(state, norm.weight, factor * (variance + norm.eps).sqrt())
    _set(state, norm.bias, centre)


def _set(state: State, name: str, value: torch.Tensor) -> None:
    state[name] = value.to(state[name].dtype)
