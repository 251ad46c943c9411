"""The last layer alone, fitted to an ensemble: the control of a refit, on a network not fused.

Notation of shapes: n inputs, f features, k classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fxfuse.errors import MemberError, OptionError
from fxfuse.refine.batch import logits_of, try_call
from fxfuse.refine.modes import check_teachers, device_of, evaluating
from fxfuse.refine.regression.head import fit_head
from fxfuse.refine.regression.solve import Ridge


def refit_head(
    module: nn.Module,
    members: Sequence[nn.Module],
    inputs: Tensor,
    *,
    layer: str,
    alpha: float = 1e-3,
) -> None:
    """Fit the last layer of a classifier to the ensemble in place, in closed form, without labels.

    Least squares to the mean of the members' logits, then a convex fit of the KL divergence to the
    ensemble's probabilities; every other layer stays as it is. Modes stay as they are, too.

    Args:
        module: A network whose output `[n, k]` is that of `layer`.
        members: The networks to fit to; run in eval mode, on the module's device.
        inputs: Unlabelled inputs `[n, *]`, of the dtype that the network takes; 100 to 1,000.
        layer: Dotted path of the last layer, an `nn.Linear` on `[n, f]`.
        alpha: Ridge, relative to the mean square of a feature.

    Raises:
        OptionError: `layer` is not the last layer, or not a linear layer with a bias.
        InputError: A network rejects the inputs.
        MemberError: A member has other classes.
    """
    check_teachers(module, members, "members")
    last = _linear(module, layer)
    device = device_of(module, None)
    x = inputs.to(device)
    seen: list[tuple[Tensor, Tensor]] = []
    hook = last.register_forward_hook(lambda _, given, answer: seen.append((given[0], answer)))
    try:
        with evaluating([module, *members], device), torch.no_grad():
            output = logits_of(try_call(module, (x,), "the network"))
            answers = [logits_of(try_call(member, (x,), "a member")) for member in members]
    finally:
        hook.remove()
    if len(seen) != 1 or output.dim() != 2 or not torch.equal(seen[0][1], output):
        raise OptionError(
            f"the output of layer {layer!r} is not the network's output",
            where="layer",
            why="it is fitted to the ensemble's logits [n, k]",
            how="name the last layer of a classifier",
        )
    if any(answer.shape != output.shape for answer in answers):
        raise MemberError(
            "a member has other classes than the network",
            where=f"network {list(output.shape)}, members {[list(a.shape) for a in answers]}",
            why="logits are fitted class by class",
            how="pass members with the network's classes",
        )
    rows = seen[0][0].float().unsqueeze(1)
    wanted = torch.stack(answers).float().mean(dim=0)
    start = Ridge(rows, centred=True).fit(wanted, alpha)
    fit = fit_head(rows, wanted, start, alpha)
    with torch.no_grad():
        last.weight.copy_(fit.matrix[0].T)
        last.bias.copy_(fit.shift[0])


def _linear(module: nn.Module, layer: str) -> nn.Linear:
    found = dict(module.named_modules()).get(layer)
    if isinstance(found, nn.Linear) and isinstance(found.bias, Tensor):
        return found
    raise OptionError(
        f"{layer!r} is not a linear layer with a bias",
        where="layer",
        why=f"{type(module).__name__} has "
        + (f"a {type(found).__name__} there" if found is not None else "no such module")
        + ", and only a linear layer is fitted in closed form",
        how="pass the dotted path of the last nn.Linear, as in named_modules()",
    )
